#include "run/request.h"

#include <cmath>
#include <set>

#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isfinite.h>

#include "run/tensors.h"
#include "files/text.h"

namespace olss {

namespace {

constexpr auto kind = Error::Kind::input;

std::string sizes_text(std::int64_t least, std::int64_t most, std::int64_t multiple) {
    if (least == most) return concat(least);
    return concat(least, "…", most, multiple == 1 ? "" : concat(" in steps of ", multiple));
}

void check_kind(const std::string& what, const at::Tensor& tensor, const std::string& dtype) {
    if (!tensor.defined()) fail(kind, what, " is not a defined tensor");
    if (tensor.scalar_type() != dtype_named(dtype) || !tensor.device().is_cpu() || tensor.layout() != at::kStrided)
        fail(kind, what, " is ", name_of(tensor.scalar_type()), " on ", tensor.device().str(),
             "; this engine takes a dense ", dtype, " on the CPU: convert it, or build another engine");
}

// `given` as the network takes it. With `one_row` a tensor of one row stands for every sample.
at::Tensor argument(const Input& input, const std::string& what, const at::Tensor& given, std::int64_t samples,
                    bool one_row) {
    check_kind(what, given, input.dtype);
    const Shape wanted = shape_of(input, samples);
    if (one_row && input.per_sample && given.sizes() == shape_of(input, 1)) return given.expand(wanted);
    if (given.sizes() != wanted) fail(kind, what, " has shape ", shown(given.sizes()), "; expected ", shown(wanted));
    return given;
}

at::Tensor joined(const Input& input, const at::Tensor& without, const at::Tensor& given) {
    if (input.per_sample) return at::cat({without, given});
    if (!at::equal(without, given))
        fail(kind, "conditioning and unconditional differ in ", quote(input.name),
             ", which belongs to no sample, and the network is asked "
             "about both at once: give both the same");
    return given.contiguous();
}

}  // namespace

std::string text_of(const Profile& profile) {
    std::vector<std::string> axes;
    for (std::size_t i = 0; i < profile.min.size(); ++i)
        axes.push_back(sizes_text(profile.min[i], profile.max[i], profile.multiple[i]));
    return listed(axes, " × ");
}

void check_shape(const Profile& profile, at::IntArrayRef shape) {
    if (shape.size() != profile.min.size())
        fail(kind, "noise has shape ", shown(shape), "; this engine takes ", profile.min.size(), " axes, ",
             text_of(profile));
    for (std::size_t i = 0; i < shape.size(); ++i)
        if (shape[i] < profile.min[i] || shape[i] > profile.max[i] || shape[i] % profile.multiple[i])
            fail(kind, "noise has shape ", shown(shape), ", and axis ", i,
                 " does not fit the engine's profile: expected ",
                 sizes_text(profile.min[i], profile.max[i], profile.multiple[i]),
                 "; build an engine with a wider profile for others");
}

void check_noise(const Description& engine, const at::Tensor& noise) {
    if (noise.defined()) check_shape(engine.profile, noise.sizes());
    check_kind("noise", noise, engine.dtype);
    if (!noise.is_contiguous())
        fail(kind, "noise has the strides ", shown(noise.strides()), ", it is not contiguous; call contiguous() first");
    if (!at::isfinite(noise).all().item<bool>()) fail(kind, "the noise holds NaN or infinity");
}

std::size_t chosen_plan(const Description& engine, const std::optional<std::int64_t>& steps,
                        const std::optional<std::string>& plan) {
    if (steps && plan) fail(kind, "steps and plan were both given; expected one of them");
    std::vector<std::string> known;
    for (std::size_t i = 0; i < engine.plans.size(); ++i) {
        const PlanEntry& each = engine.plans[i];
        if (plan ? each.name == *plan : !steps || each.nfe == *steps) return i;
        known.push_back(concat(quote(each.name), " (", each.nfe, " steps)"));
    }
    fail(kind, "the engine has no plan ", plan ? quote(*plan) : concat("of ", *steps, " steps"), "; it has ",
         listed(known));
}

double chosen_guidance(const Description& engine, const std::optional<double>& guidance_scale) {
    const double scale = guidance_scale.value_or(engine.guidance_scale);
    if (!std::isfinite(scale)) fail(kind, "guidance_scale is ", scale, "; expected a finite number");
    if (!engine.doubled && guidance_scale && scale != 1.0)
        fail(kind, "guidance_scale is ", scale, ", but this engine is built without guidance: expected 1");
    return scale;
}

template <typename Values>
void check_names(const Description& engine, const std::map<std::string, Values>& given, const char* what) {
    std::vector<std::string> missing, unknown, known;
    std::set<std::string> names;
    for (const Input& each : engine.inputs) {
        names.insert(each.name), known.push_back(quote(each.name));
        if (!given.count(each.name)) missing.push_back(quote(each.name));
    }
    for (const auto& [name, value] : given)
        if (!names.count(name)) unknown.push_back(quote(name));
    if (missing.empty() && unknown.empty()) return;
    const std::string faults =
        concat(missing.empty() ? "" : listed(missing) + " missing", missing.empty() || unknown.empty() ? "" : " and ",
               unknown.empty() ? "" : listed(unknown) + " unknown");
    fail(kind, what, ": ", faults, "; this engine takes the arguments: ", known.empty() ? "none" : listed(known));
}

template void check_names(const Description&, const std::map<std::string, at::Tensor>&, const char*);
template void check_names(const Description&, const std::map<std::string, std::string>&, const char*);

std::vector<at::Tensor> network_inputs(const Description& engine, const Request& request,
                                       const std::map<std::string, at::Tensor>& defaults) {
    const std::int64_t samples = request.noise.size(0);
    check_names(engine, request.conditioning, "conditioning");
    if (!engine.doubled && !request.unconditional.empty())
        fail(kind, "unconditional was given, but this engine is built without guidance");
    std::map<std::string, at::Tensor> without = request.unconditional;
    without.insert(defaults.begin(), defaults.end());
    if (engine.doubled) check_names(engine, without, "unconditional");
    std::vector<at::Tensor> result;
    for (const Input& each : engine.inputs) {
        const std::string name = quote(each.name);
        const at::Tensor given =
            argument(each, "conditioning " + name, request.conditioning.at(each.name), samples, false);
        result.push_back(
            !engine.doubled
                ? given.contiguous()
                : joined(each, argument(each, "unconditional " + name, without.at(each.name), samples, true), given));
    }
    return result;
}

Shape shape_of(const Input& input, std::int64_t samples) {
    Shape shape = input.shape;
    if (input.per_sample) shape.insert(shape.begin(), samples);
    return shape;
}

}  // namespace olss
