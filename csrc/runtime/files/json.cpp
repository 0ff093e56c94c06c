#include "files/json.h"

#include <algorithm>
#include <limits>
#include <unordered_set>

#define JSON_NO_IO
#include <nlohmann/json.hpp>

#include "files/text.h"

namespace olss {

namespace {

// As in olss_fast/support/json.py.
constexpr std::size_t most_depth = 32;
constexpr std::size_t most_parts = std::size_t{1} << 18;  // 16 MiB of "[[],[],…" would be gigabytes in memory

// Takes what nlohmann's parser reads, and refuses what it would allow.
class Builder {
  public:
    Json result;
    std::string fault;

    bool refuse(std::string reason) { return fault = std::move(reason), false; }

    bool null() { return put({}); }
    bool boolean(bool truth) { return put({truth}); }
    bool number_unsigned(std::uint64_t number) {
        if (number > std::numeric_limits<std::int64_t>::max()) return refuse("a number out of range");
        return put({static_cast<std::int64_t>(number)});
    }
    bool number_integer(std::int64_t number) {  // below zero, or -0, about which readers do not agree
        return number ? put({number}) : refuse("a number out of range");
    }
    bool number_float(double number, const std::string& text) {
        const bool whole = text.find_first_of(".eE") == text.npos;  // and beyond 64 bits
        const bool vanished = number == 0 && text.substr(0, text.find_first_of("eE")).find_first_of("123456789") != text.npos;
        return whole || vanished ? refuse("a number out of range") : put({number});
    }
    bool string(std::string& text) { return put({std::move(text)}); }
    bool binary(nlohmann::json::binary_t&) { return refuse("bytes"); }

    bool start_object(std::size_t) { return open({Json::Object{}}); }
    bool start_array(std::size_t) { return open({Json::Array{}}); }
    bool key(std::string& name) { return open_.back().name = std::move(name), true; }
    bool end_array() {
        Json done = std::move(open_.back().value);
        open_.pop_back();
        return put(std::move(done));
    }
    bool end_object() {
        std::unordered_set<std::string_view> names;
        for (const auto& [name, value] : *open_.back().value.as<Json::Object>())
            if (!names.insert(name).second) return refuse("the name " + quote(name) + " occurs twice");
        return end_array();
    }

    bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) {
        const std::string text = error.what();
        return refuse(quote(text.substr(std::min(text.size(), text.find("] ") + 2)), 200));
    }

  private:
    struct Open {
        Json value;
        std::string name;  // of the member that comes next
    };

    bool count() { return ++parts_ <= most_parts || refuse(concat("more than ", most_parts, " parts")); }

    bool open(Json value) {
        if (open_.size() == most_depth) return refuse(concat("nested more than ", most_depth, " deep"));
        open_.push_back({std::move(value), ""});
        return count();
    }

    bool put(Json value) {
        if (open_.empty()) return result = std::move(value), true;
        if (auto* items = std::get_if<Json::Array>(&open_.back().value.value))
            return items->push_back(std::move(value)), items->size() == 1 || count();
        auto& members = std::get<Json::Object>(open_.back().value.value);
        members.emplace_back(std::move(open_.back().name), std::move(value));
        return members.size() == 1 || count();
    }

    std::vector<Open> open_;
    std::size_t parts_ = 0;  // opening brackets and commas
};

}  // namespace
const Json* Json::find(std::string_view name) const {
    if (const Object* members = as<Object>())
        for (const auto& [each, member] : *members)
            if (each == name) return &member;
    return nullptr;
}

std::string Json::summary() const {
    if (const bool* truth = as<bool>()) return *truth ? "true" : "false";
    if (const std::int64_t* integer = as<std::int64_t>()) return concat(*integer);
    if (const double* number = as<double>()) return concat(*number);
    if (const std::string* text = as<std::string>()) return quote(*text);
    std::vector<std::string> parts;
    const std::size_t most = 8;
    if (const Array* items = as<Array>()) {
        for (std::size_t i = 0; i < std::min(most, items->size()); ++i) parts.push_back((*items)[i].summary());
        return concat("[", listed(parts), items->size() > most ? ", …]" : "]");
    }
    if (const Object* members = as<Object>()) {
        for (std::size_t i = 0; i < std::min(most, members->size()); ++i)
            parts.push_back(concat(quote((*members)[i].first), ": ", (*members)[i].second.summary()));
        return concat("{", listed(parts), members->size() > most ? ", …}" : "}");
    }
    return "null";
}

bool Json::operator==(const Json& other) const {
    const Object *members = as<Object>(), *others = other.as<Object>();
    if (!members || !others) return value == other.value;
    return members->size() == others->size() && std::all_of(members->begin(), members->end(), [&](const auto& each) {
               const Json* there = other.find(each.first);
               return there && each.second == *there;
           });
}

Json parse_json(std::string_view text, const std::string& what) {
    Builder builder;
    // Two things that nlohmann's lexer passes over: a byte order mark, and a zero, which ends its input.
    if (text.find('\0') != text.npos || text.substr(0, 3) == "\xef\xbb\xbf") builder.refuse("a zero or a byte order mark");
    else nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
    if (!builder.fault.empty())
        fail(Error::Kind::file, what, " is not valid JSON (", builder.fault, "); copy or build the file again");
    return builder.result;
}

}  // namespace olss
