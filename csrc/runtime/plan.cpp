#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "sha256.h"
#include "text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr std::size_t most_bytes = std::size_t{16} << 20, most_header = std::size_t{1} << 20;
constexpr std::int64_t most_steps = 4096, most_columns = 16384;
constexpr const char* entry_name = "olss_fast.plan";

// A plan file being read.
struct Reader {
    const TensorView& file;
    std::string_view text;
    std::size_t data_begin = 0;
    Json header, entry;
    std::vector<TableEntry> table;

    const TableEntry& described(const std::string& name, const char* dtype, std::size_t dimensions) const {
        for (const TableEntry& each : table)
            if (each.name == name && each.dtype == dtype && each.shape.size() == dimensions) return each;
        fail(kind, "it has no tensor ", quote(name), " of dtype ", dtype, " in ", dimensions, " dimension(s)");
    }

    template <typename T>
    std::vector<T> values(const TableEntry& entry) const {
        std::vector<T> result((entry.end - entry.begin) / sizeof(T));
        if (!result.empty())
            std::memcpy(result.data(), text.data() + data_begin + entry.begin, entry.end - entry.begin);
        return result;
    }

    std::vector<double> finite(const TableEntry& entry) const {
        std::vector<double> result = values<double>(entry);
        for (double& value : result) {
            if (!std::isfinite(value))
                fail(kind, entry.name, " holds ", value, "; every number of a plan must be finite");
            value += 0.0;  // -0.0 + 0.0 == 0.0
        }
        return result;
    }
};

// safetensors lists the tensors in an order of its own: by place, they must follow each other.
Json in_order_of_place(const Json& header) {
    Json::Object members = *header.as<Json::Object>();
    const auto begin = [](const auto& member) -> std::int64_t {
        const Json* offsets = member.second.find("data_offsets");
        const Json::Array* both = offsets ? offsets->template as<Json::Array>() : nullptr;
        const std::int64_t* first = both && !both->empty() ? both->front().template as<std::int64_t>() : nullptr;
        return first ? *first : 0;
    };
    std::stable_sort(members.begin(), members.end(), [&](const auto& a, const auto& b) { return begin(a) < begin(b); });
    return {std::move(members)};
}

void check_digest(const Reader& reader) {
    const Json* member = reader.entry.find("sha256");
    const std::string* claimed = member ? member->as<std::string>() : nullptr;
    std::string content(reader.text);
    const std::size_t place = claimed && claimed->size() == 64 ? content.find(*claimed) : std::string::npos;
    if (place == std::string::npos)
        fail(kind, "its sha256 is ", member ? member->summary() : "missing", "; expected 64 hexadecimal digits");
    content.replace(place, 64, 64, '0');
    if (hexadecimal(sha256(reinterpret_cast<const unsigned char*>(content.data()), content.size())) != *claimed)
        fail(kind, "its sha256 is not that of its content: damaged or altered; build the engine again");
}

void check_members(const Json& entry) {
    const Json* metadata = entry.find("metadata");
    const Json::Object* told = metadata ? metadata->as<Json::Object>() : nullptr;
    bool fits = told && entry.as<Json::Object>()->size() == 5 && entry.find("sha256") && entry.find("branches");
    for (std::size_t i = 0; fits && i < told->size(); ++i) fits = (*told)[i].second.as<std::string>();
    if (!fits)
        fail(kind, "its entry is ", entry.summary(), " with the metadata ", metadata ? metadata->summary() : "missing",
             "; expected sha256, branches, format, metadata and version, and strings as metadata");
}

void check_entry(const Json& entry) {
    const Json *format = entry.find("format"), *version = entry.find("version");
    const std::string* name = format ? format->as<std::string>() : nullptr;
    const std::int64_t* number = version ? version->as<std::int64_t>() : nullptr;
    if (!name || *name != entry_name || !number || *number != 1)
        fail(kind, "its format and version are ", format ? format->summary() : "missing", " and ",
             version ? version->summary() : "missing", "; expected ", entry_name, " and 1; build the engine again");
}

Reader opened(const TensorView& file) {
    Reader reader{file, {reinterpret_cast<const char*>(file.data), file.size}, 0, {}, {}, {}};
    std::uint64_t size = 0;
    if (file.size < 8 || file.size > most_bytes) fail(kind, "it has ", file.size, " bytes; expected 8 to ", most_bytes);
    for (int i = 7; i >= 0; --i) size = size << 8 | file.data[i];
    if (size > most_header || 8 + size > file.size)
        fail(kind, "its header should have ", size, " bytes, and it has ", file.size, " in all");
    reader.data_begin = 8 + static_cast<std::size_t>(size);
    if (reader.text.substr(8, 1) != "{") fail(kind, "its header does not begin with a brace");
    reader.header = parse_json(reader.text.substr(8, reader.data_begin - 8), "its header");
    reader.entry = parse_json(metadata_entry(reader.header, entry_name), "its entry");
    check_entry(reader.entry);
    check_members(reader.entry);
    reader.table = tensor_table(in_order_of_place(reader.header), file.size - reader.data_begin);
    if (reader.table.size() != 5) fail(kind, "it holds ", reader.table.size(), " tensors; expected 5");
    check_digest(reader);
    return reader;
}

void check_shapes(const Reader& reader, const Plan& plan, const Shape& rows) {
    const bool fits = plan.nfe >= 1 && plan.nfe <= most_steps && rows[0] == plan.nfe + 1 &&
                      rows[1] >= plan.first_noise() && rows[1] <= most_columns;
    if (!fits) fail(kind, "rows has shape ", shown(rows), " for ", plan.nfe, " timesteps and branches=", plan.branches);
    for (const auto& [name, dtype, length] :
         {std::tuple{"alphas", "F64", plan.nfe + 1}, {"sigmas", "F64", plan.nfe + 1}, {"models", "I64", plan.nfe}})
        if (reader.described(name, dtype, 1).shape[0] != length)
            fail(kind, name, " does not have ", length, " entries");
}

void check_levels(const Reader& reader) {
    const std::vector<double> alphas = reader.finite(reader.described("alphas", "F64", 1)),
                              sigmas = reader.finite(reader.described("sigmas", "F64", 1));
    for (std::size_t i = 0; i < alphas.size(); ++i)
        if (alphas[i] < 0 || sigmas[i] < 0 || (alphas[i] == 0 && sigmas[i] == 0))
            fail(kind, "row ", i, " has the signal and noise levels ", alphas[i], " and ", sigmas[i],
                 "; expected neither below 0, nor both 0");
}

void check_causality(const Plan& plan) {
    for (std::int64_t row = 0; row <= plan.nfe; ++row)
        for (std::int64_t column = 1 + row * plan.branches; column < plan.first_noise(); ++column)
            if (const double value = plan.rows[row * plan.columns + column]; value != 0)
                fail(kind, "rows[", row, ", ", column, "] is ", value,
                     "; expected exactly 0: that output does not exist yet");
}

Plan decoded(const TensorView& file) {
    const Reader reader = opened(file);
    const Json* branches = reader.entry.find("branches");
    const std::int64_t* number = branches ? branches->as<std::int64_t>() : nullptr;
    if (!number || (*number != 1 && *number != 2))
        fail(kind, "branches is ", branches ? branches->summary() : "missing", "; expected 1 or 2");
    const TableEntry &times = reader.described("timesteps", "F64", 1), &rows = reader.described("rows", "F64", 2);
    Plan plan{times.shape[0], *number, rows.shape[1], {}, {}};
    if (plan.nfe > most_steps) fail(kind, "it has ", plan.nfe, " timesteps; expected at most ", most_steps);
    check_shapes(reader, plan, rows.shape);
    plan.timesteps = reader.finite(times), plan.rows = reader.finite(rows);
    for (double time : plan.timesteps)
        if (std::abs(time) > std::numeric_limits<float>::max())
            fail(kind, "timestep ", time, " is beyond float32, which networks are handed");
    check_levels(reader);
    check_causality(plan);
    for (std::int64_t model : reader.values<std::int64_t>(reader.described("models", "I64", 1)))
        if (model != 0) fail(kind, "it uses network ", model, "; an engine has one network, number 0");
    return plan;
}

}  // namespace

Plan parse_plan(const TensorView& file) {
    try {
        return decoded(file);
    } catch (const Error& error) {
        throw Error(error.kind(), concat("the plan ", quote(file.name), " is unusable: ", error.what()));
    }
}

}  // namespace olss
