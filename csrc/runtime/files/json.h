// Strict JSON (RFC 8259), read by nlohmann's parser: UTF-8, no repeated names, no NaN or Infinity, bounded in depth and in
// values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace olss {

struct Json {
    using Array = std::vector<Json>;
    using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the text; no name twice
    std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value = nullptr;

    // The value as a T, or nullptr where it is something else: number.as<std::int64_t>().
    template <typename T>
    const T* as() const {
        return std::get_if<T>(&value);
    }
    bool is_null() const { return value.index() == 0; }
    // The member of that name, or nullptr if there is none, or if this is not an object.
    const Json* find(std::string_view name) const;
    // For error messages: the value in a few words.
    std::string summary() const;
    // Equal types and values; the members of objects in any order.
    bool operator==(const Json& other) const;
};

// The value in `text`, which may have white space around it. Throws Error(file); `what` names the text.
// A number without fraction and exponent is an integer and must fit in 64 bits.
Json parse_json(std::string_view text, const std::string& what);

}  // namespace olss
