#include "engine/manifest.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <set>

#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr std::int64_t largest_number = std::int64_t{1} << 40, largest_size = (std::int64_t{1} << 31) - 1;  // of an axis
constexpr double largest_scale = 3.4e38;  // single precision, as which scales are used
const std::set<std::string> dtypes = {"float64", "float32", "float16", "bfloat16", "int64",
                                      "int32",   "int16",   "int8",    "uint8",    "bool"};
const std::set<std::string> noise_dtypes = {"float64", "float32", "float16", "bfloat16"};

// A value of the manifest and its name for error messages.
struct Item {
    const Json& json;
    std::string name;

    [[noreturn]] void refuse(const std::string& expected) const {
        fail(kind, "the manifest's ", name, " is ", json.summary(), "; expected ", expected);
    }
    template <typename T>
    const T& as(const char* expected) const {
        const T* value = json.as<T>();
        if (!value) refuse(expected);
        return *value;
    }
    const std::string& text() const { return as<std::string>("a string"); }
    std::int64_t integer(std::int64_t least, std::int64_t most) const {
        const std::int64_t number = as<std::int64_t>("a whole number");
        if (number < least || number > most) refuse(concat("a whole number from ", least, " to ", most));
        return number;
    }
    double number() const {
        const std::int64_t* integer = json.as<std::int64_t>();
        const double value = integer ? static_cast<double>(*integer) : as<double>("a number");
        if (!(std::abs(value) < largest_scale)) refuse("a finite number of single precision");
        return value;
    }
    Item member(const std::string& member_name) const {
        const Json* value = json.find(member_name);
        if (!value) refuse("an object with the member " + quote(member_name));
        return {*value, name.empty() ? member_name : name + "." + member_name};
    }
};

void expect_members(const Item& item, std::initializer_list<const char*> expected) {
    const std::set<std::string> wanted(expected.begin(), expected.end());
    std::set<std::string> found;
    for (const auto& [name, value] : item.as<Json::Object>("an object")) found.insert(name);
    const auto differs = [&](const char* how, const std::string& name) {
        fail(kind, item.name.empty() ? "the manifest" : "the manifest's " + item.name, how, quote(name),
             "; expected exactly the members ", listed(wanted));
    };
    for (const std::string& name : wanted)
        if (!found.count(name)) differs(" has no member ", name);
    for (const std::string& name : found)
        if (!wanted.count(name)) differs(" has the unknown member ", name);
}

template <typename Read>
auto list_of(const Item& item, Read read) {
    std::vector<decltype(read(item))> result;
    for (const Json& each : item.as<Json::Array>("a list"))
        result.push_back(read(Item{each, concat(item.name, "[", result.size(), "]")}));
    return result;
}

template <typename Read>
auto map_of(const Item& item, Read read) {
    std::map<std::string, decltype(read(item))> result;
    for (const auto& [name, value] : item.as<Json::Object>("an object"))
        result[name] = read(Item{value, item.name + "." + quote(name)});
    return result;
}

std::string text(const Item& item) { return item.text(); }

std::string text_or_null(const Item& item) { return item.json.is_null() ? "" : item.text(); }

Shape numbers(const Item& item, std::int64_t least = 0, std::int64_t most = largest_number) {
    return list_of(item, [&](const Item& each) { return each.integer(least, most); });
}

Shape sizes(const Item& item) { return numbers(item, 1, largest_size); }

std::string one_of(const Item& item, const std::set<std::string>& names) {
    if (!names.count(item.text())) item.refuse("one of " + listed(names));
    return item.text();
}

Machine machine(const Item& item) {
    expect_members(item, {"device", "name", "system", "architecture", "capability", "instructions"});
    const Item capability = item.member("capability");
    return {one_of(item.member("device"), {"cpu", "cuda"}),
            item.member("name").text(),
            item.member("system").text(),
            item.member("architecture").text(),
            capability.json.is_null() ? Shape{} : numbers(capability),
            list_of(item.member("instructions"), text)};
}

Profile profile(const Item& item) {
    expect_members(item, {"min", "opt", "max", "multiple"});
    Profile result{sizes(item.member("min")), sizes(item.member("opt")), sizes(item.member("max")),
                   sizes(item.member("multiple"))};
    const std::size_t axes = result.min.size();
    bool fits = axes >= 2 && axes <= 16 && result.opt.size() == axes && result.max.size() == axes &&
                result.multiple.size() == axes;
    for (std::size_t i = 0; fits && i < axes; ++i)
        fits = result.min[i] <= result.opt[i] && result.opt[i] <= result.max[i] &&
               result.min[i] % result.multiple[i] == 0 && result.opt[i] % result.multiple[i] == 0 &&
               result.max[i] % result.multiple[i] == 0;
    if (!fits) item.refuse("min <= opt <= max of 2 to 16 axes, all of them multiples of multiple");
    return result;
}

Input input(const Item& item) {
    expect_members(item, {"name", "dtype", "shape"});
    Input result{item.member("name").text(), one_of(item.member("dtype"), dtypes), false, {}};
    const Json::Array& shape = item.member("shape").as<Json::Array>("a list");
    const std::string* first = shape.empty() ? nullptr : shape.front().as<std::string>();
    result.per_sample = first && *first == "batch";
    if (result.name.empty() || shape.size() > 16) item.refuse("a name and at most 16 axes");
    for (std::size_t i = result.per_sample; i < shape.size(); ++i)
        result.shape.push_back(Item{shape[i], concat(item.name, ".shape[", i, "]")}.integer(0, largest_size));
    return result;
}

PlanEntry plan(const Item& item) {
    expect_members(item, {"name", "nfe", "branches", "noises", "sha256"});
    return {item.member("name").text(), item.member("nfe").integer(1, 4096), item.member("branches").integer(1, 2),
            item.member("noises").integer(0, 16384), item.member("sha256").text()};
}

void check_names(const Description& engine) {
    std::set<std::string> inputs, plans;
    for (const Input& each : engine.inputs)
        if (!inputs.insert(each.name).second) fail(kind, "the manifest has two inputs of the name ", quote(each.name));
    for (const PlanEntry& each : engine.plans)
        if (!plans.insert(each.name).second) fail(kind, "the manifest has two plans of the name ", quote(each.name));
    if (plans.empty()) fail(kind, "the manifest names no plan; expected at least one");
}

}  // namespace

Description description_of(const Json& manifest) {
    const Item all{manifest, ""};
    expect_members(
        all, {"sha256", "format", "version", "notice", "built_with", "machine", "network", "dtype", "profile",
              "doubled", "guidance_scale", "inputs", "fixed", "plans", "strides", "unused", "tied", "hashes", "measured"});
    expect_members(all.member("built_with"), {"olss_fast", "torch", "triton", "cuda", "driver"});
    for (const char* each : {"olss_fast", "torch"}) all.member("built_with").member(each).text();
    expect_members(all.member("hashes"), {"weights", "code"});
    Description result;
    result.notice = all.member("notice").text();
    result.network = all.member("network").text();
    result.dtype = one_of(all.member("dtype"), noise_dtypes);
    result.built_with = map_of(all.member("built_with"), text_or_null);
    result.machine = machine(all.member("machine"));
    result.profile = profile(all.member("profile"));
    result.doubled = all.member("doubled").as<bool>("true or false");
    result.guidance_scale = all.member("guidance_scale").number();
    result.inputs = list_of(all.member("inputs"), input);
    result.fixed = map_of(all.member("fixed"), text);
    result.plans = list_of(all.member("plans"), plan);
    result.strides = map_of(all.member("strides"), [](const Item& item) { return numbers(item); });
    result.unused = list_of(all.member("unused"), text);
    result.tied = map_of(all.member("tied"), text);
    result.hashes = map_of(all.member("hashes"), text);
    result.measured = map_of(all.member("measured"), [](const Item& item) { return item.number(); });
    check_names(result);
    return result;
}

}  // namespace olss
