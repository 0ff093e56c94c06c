#include "engine/plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::file;
constexpr Format format{"olss_fast.plan", 1, std::size_t{1} << 20, std::size_t{16} << 20};
constexpr std::int64_t most_steps = 4096, most_columns = 16384;

const TensorView& described(const Container& file, const std::string& name, const char* dtype, std::size_t dimensions) {
    for (const TensorView& each : file.tensors())
        if (each.name == name && each.dtype == dtype && each.shape.size() == dimensions) return each;
    fail(kind, "it has no tensor ", quote(name), " of dtype ", dtype, " in ", dimensions, " dimension(s)");
}

template <typename T>
std::vector<T> values(const TensorView& tensor) {
    std::vector<T> result(tensor.size / sizeof(T));
    if (!result.empty()) std::memcpy(result.data(), tensor.data, tensor.size);
    return result;
}

std::vector<double> finite(const TensorView& tensor) {
    std::vector<double> result = values<double>(tensor);
    for (double& value : result) {
        if (!std::isfinite(value))
            fail(kind, tensor.name, " holds ", value, "; every number of a plan must be finite");
        value += 0.0;  // -0.0 + 0.0 == 0.0
    }
    return result;
}

void check_members(const Json& entry) {
    const Json* metadata = entry.find("metadata");
    const Json::Object* told = metadata ? metadata->as<Json::Object>() : nullptr;
    bool fits = told && entry.as<Json::Object>()->size() == 5 && entry.find("branches");
    for (std::size_t i = 0; fits && i < told->size(); ++i) fits = (*told)[i].second.as<std::string>();
    if (!fits)
        fail(kind, "its entry is ", entry.summary(),
             "; expected sha256, branches, format, metadata and version, and strings as metadata");
}

void check_shapes(const Container& file, const Plan& plan, const Shape& rows) {
    const bool fits = plan.nfe >= 1 && plan.nfe <= most_steps && rows[0] == plan.nfe + 1 &&
                      rows[1] >= plan.first_noise() && rows[1] <= most_columns;
    if (!fits) fail(kind, "rows has shape ", shown(rows), " for ", plan.nfe, " timesteps and branches=", plan.branches);
    for (const auto& [name, dtype, length] :
         {std::tuple{"alphas", "F64", plan.nfe + 1}, {"sigmas", "F64", plan.nfe + 1}, {"models", "I64", plan.nfe}})
        if (described(file, name, dtype, 1).shape[0] != length)
            fail(kind, name, " does not have ", length, " entries");
}

void check_levels(const Container& file) {
    const std::vector<double> alphas = finite(described(file, "alphas", "F64", 1)),
                              sigmas = finite(described(file, "sigmas", "F64", 1));
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

Plan decoded(const TensorView& content) {
    const Container file(source_of(content.text()), format);
    check_members(file.entry());
    if (file.tensors().size() != 5) fail(kind, "it holds ", file.tensors().size(), " tensors; expected 5");
    const Json* branches = file.entry().find("branches");
    const std::int64_t* number = branches ? branches->as<std::int64_t>() : nullptr;
    if (!number || (*number != 1 && *number != 2))
        fail(kind, "branches is ", branches ? branches->summary() : "missing", "; expected 1 or 2");
    const TensorView &times = described(file, "timesteps", "F64", 1), &rows = described(file, "rows", "F64", 2);
    Plan plan{times.shape[0], *number, rows.shape[1], {}, {}};
    if (plan.nfe > most_steps) fail(kind, "it has ", plan.nfe, " timesteps; expected at most ", most_steps);
    check_shapes(file, plan, rows.shape);
    plan.timesteps = finite(times), plan.rows = finite(rows);
    for (double time : plan.timesteps)
        if (std::abs(time) > std::numeric_limits<float>::max())
            fail(kind, "timestep ", time, " is beyond float32, which networks are handed");
    check_levels(file);
    check_causality(plan);
    for (std::int64_t model : values<std::int64_t>(described(file, "models", "I64", 1)))
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
