#include "engine/layout.h"

#include <algorithm>
#include <optional>

#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr std::size_t most_bytes = std::size_t{16} << 20;

struct Entry {
    std::string dtype;
    Shape shape;
    std::optional<Shape> strides;  // none: in C order
    bool operator==(const Entry&) const = default;
};
using Layout = std::map<std::string, Entry>;

std::optional<Shape> numbers(const Json* json) {
    const Json::Array* items = json ? json->as<Json::Array>() : nullptr;
    Shape result;
    for (std::size_t i = 0; items && i < items->size(); ++i) {
        const std::int64_t* number = (*items)[i].as<std::int64_t>();
        if (!number || *number < 0 || *number > std::int64_t{1} << 40) return std::nullopt;
        result.push_back(*number);
    }
    return items ? std::optional<Shape>(result) : std::nullopt;
}

Entry entry_of(const std::string& name, const Json& json) {
    const Json *dtype = json.find("dtype"), *strides = json.find("strides");
    const std::optional<Shape> shape = numbers(json.find("shape"));
    const bool fits = json.as<Json::Object>() && json.as<Json::Object>()->size() == 3 && dtype &&
                      dtype->as<std::string>() && shape && strides && (strides->is_null() || numbers(strides));
    if (!fits)
        fail(kind, "weights.json's weights.", quote(name), " is ", json.summary(), "; expected dtype, shape and strides");
    return {*dtype->as<std::string>(), *shape, numbers(strides)};
}

Json read(const TensorView& file) {
    if (file.size > most_bytes) fail(kind, "weights.json has ", file.size, " bytes; expected at most ", most_bytes);
    return parse_json(file.text(), "weights.json");
}

void check_manifest(const Json& compiled_for, const Json& manifest) {
    const Json::Object* members = compiled_for.as<Json::Object>();
    for (const char* name : {"device", "dtype", "profile", "doubled", "inputs"}) {
        const Json* here = std::string_view(name) == "device" ? manifest.find("machine")->find(name) : manifest.find(name);
        const Json* there = compiled_for.find(name);
        if (!there || !(*here == *there))
            fail(kind, "its ", name, " is ", here->summary(), " and its code was compiled for ",
                 there ? there->summary() : "none", ": build it again");
    }
    if (members->size() != 6) fail(kind, "weights.json is ", compiled_for.summary(), "; expected device, doubled, dtype, inputs, profile and weights");
}

Layout expected_of(const Json& compiled_for) {
    const Json* weights = compiled_for.find("weights");
    if (!weights || !weights->as<Json::Object>())
        fail(kind, "weights.json's weights is ", weights ? weights->summary() : "missing", "; expected an object");
    Layout result;
    for (const auto& [name, each] : *weights->as<Json::Object>()) result[name] = entry_of(name, each);
    return result;
}

Layout found_in(const std::vector<TensorView>& weights, const std::map<std::string, Shape>& strides) {
    Layout result;
    for (const TensorView& each : weights) {
        const auto own = strides.find(each.name);
        result[each.name] = {each.dtype, each.shape,
                             own == strides.end() ? std::nullopt : std::make_optional(own->second)};
    }
    return result;
}

std::string told(const Layout& layout, const std::string& name) {
    const auto found = layout.find(name);
    if (found == layout.end()) return "none";
    const Entry& each = found->second;
    return concat(quote(each.dtype), " of shape ", shown(each.shape),
                  each.strides ? " with strides " + shown(*each.strides) : "");
}

// Whether the elements fill one block of memory, in some order of the axes.
bool dense(const Shape& shape, const Shape& strides) {
    if (shape.size() != strides.size()) return false;
    std::vector<std::pair<std::int64_t, std::int64_t>> axes;
    for (std::size_t i = 0; i < shape.size(); ++i) axes.emplace_back(strides[i], shape[i]);
    std::sort(axes.begin(), axes.end());
    std::int64_t filled = 1;
    for (const auto& [stride, size] : axes) {
        if (size != 1 && stride != filled) return false;
        filled *= size;
    }
    return true;
}

}  // namespace

void check_compiled_for(const TensorView& layout, const Json& manifest, const std::vector<TensorView>& weights,
                        const std::map<std::string, Shape>& strides) {
    const Json compiled_for = read(layout);
    const Layout expected = expected_of(compiled_for), found = found_in(weights, strides);
    check_manifest(compiled_for, manifest);
    Layout all = expected;
    all.insert(found.begin(), found.end());
    for (const auto& [name, each] : all) {
        const auto wanted = expected.find(name), here = found.find(name);
        if (wanted == expected.end() || here == found.end() || !(wanted->second == here->second))
            fail(kind, "its weight ", quote(name), " is ", told(found, name), " and its code was compiled for ",
                 told(expected, name), "; build it again");
        if (each.strides && !dense(each.shape, *each.strides))
            fail(kind, "weight ", quote(name), " of shape ", shown(each.shape), " has the strides ",
                 shown(*each.strides), "; expected those of dense memory");
    }
}

}  // namespace olss
