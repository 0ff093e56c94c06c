#include <mutex>
#include <shared_mutex>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <torch/headeronly/version.h>

#include "engine/engine_file.h"
#include "run/loop.h"
#include "engine/machine.h"
#include "run/network.h"
#include "olss.h"
#include "run/request.h"
#include "run/tensors.h"
#include "files/text.h"
#include "translate.h"

namespace olss {

namespace {

// Buffers of ours and weights have no gradients: the machinery for them is left out of every operator.
using WithoutGradients = at::AutoDispatchBelowADInplaceOrView;

constexpr auto input = Error::Kind::input;

void check_fits(const Description& engine) {
    const std::vector<std::string> reasons = mismatches(engine);
    if (!reasons.empty()) fail(Error::Kind::machine, "this engine does not fit this machine: ", listed(reasons, "; "));
}

// What keeps `given` from taking the place of `held`, or nothing.
std::string unfit(const at::Tensor& given, const at::Tensor& held) {
    if (!given.defined()) return "is not a defined tensor";
    if (given.sizes() != held.sizes())
        return concat("has shape ", shown(given.sizes()), ", expected ", shown(held.sizes()));
    if (given.is_complex() || given.is_floating_point() != held.is_floating_point())
        return concat("is ", name_of(given.scalar_type()), ", expected ", name_of(held.scalar_type()));
    return "";
}

std::map<std::string, at::Tensor> default_arguments(const EngineFile& file) {
    std::map<std::string, at::Tensor> result;
    for (const TensorView& view : file.unconditional) result[view.name] = copied(view);
    return result;
}

}  // namespace

struct Engine::Impl {
    Impl(EngineFile file, const Options& options)
        : description(file.description), unconditional(default_arguments(file)), network(file, options.runs_at_once) {
        for (const Plan& plan : file.plans) plans.emplace_back(plan, dtype_named(description.dtype));
    }

    at::Tensor run(const Request& request) const {
        check_noise(description, request.noise);
        const Tables& plan = plans[chosen_plan(description, request.steps, request.plan)];
        const double guidance_scale = chosen_guidance(description, request.guidance_scale);
        const std::vector<at::Tensor> arguments = network_inputs(description, request, unconditional);
        const auto ask = [&](const at::Tensor& x, const at::Tensor& time) {
            std::vector<at::Tensor> inputs{x, time};
            inputs.insert(inputs.end(), arguments.begin(), arguments.end());
            return network(std::move(inputs));
        };
        const std::shared_lock<std::shared_mutex> lock(weights_in_use);
        return sample(plan, ask, request.noise, step_noise(plan, request), description.doubled, guidance_scale);
    }

    static at::Tensor step_noise(const Tables& plan, const Request& request) {
        if (plan.noises == 0) return {};
        std::vector<std::int64_t> shape = request.noise.sizes().vec();
        shape.insert(shape.begin(), plan.noises);
        const std::optional<at::Generator> generator =
            request.generator.defined() ? std::make_optional(request.generator) : std::nullopt;
        return at::randn(shape, generator, at::kFloat);
    }

    void update(const std::map<std::string, at::Tensor>& given) {
        std::vector<std::string> faults;
        for (const auto& [name, value] : given) {
            const auto held = network.weights().find(read_as(name));
            const bool unused =
                std::find(description.unused.begin(), description.unused.end(), name) != description.unused.end();
            const std::string fault = held != network.weights().end() ? unfit(value, held->second)
                                      : unused                        ? ""
                                                                      : "is none of the engine's weights";
            if (!fault.empty() && faults.size() < 8) faults.push_back(quote(name) + " " + fault);
        }
        for (const auto& [name, real] : description.tied)
            if (faults.empty() && given.count(name) && given.count(real) && !at::equal(given.at(name), given.at(real)))
                faults.push_back(quote(name) + " and " + quote(real) + " are one weight and were given different values");
        if (!faults.empty()) fail(input, "weights that do not fit, nothing was changed: ", listed(faults, "; "));
        const std::unique_lock<std::shared_mutex> lock(weights_in_use);
        for (const auto& [name, value] : given)
            if (const auto held = network.weights().find(read_as(name)); held != network.weights().end())
                held->second.copy_(value);
    }

    // The name under which the code reads a weight.
    const std::string& read_as(const std::string& name) const {
        const auto second = description.tied.find(name);
        return second == description.tied.end() ? name : second->second;
    }

    const Description description;
    const std::map<std::string, at::Tensor> unconditional;
    const CompiledNetwork network;
    std::vector<Tables> plans;
    mutable std::shared_mutex weights_in_use;  // shared by runs, exclusive while weights are written
};

Engine Engine::load(const std::string& path, const Options& options) {
    return load(guarded(Error::Kind::file, "the engine cannot be read", [&] { return EngineFile(path, options.sha256); }),
                options);
}

Engine Engine::load(EngineFile file, const Options& options) {
    return guarded(Error::Kind::internal, "the engine cannot be loaded", [&] {
        const WithoutGradients guard;
        check_fits(file.description);
        return Engine(std::make_shared<Impl>(std::move(file), options));
    });
}

const Description& Engine::describe() const { return impl_->description; }

at::Tensor Engine::run(const Request& request) const {
    return guarded(Error::Kind::internal, "the engine cannot sample", [&] {
        const WithoutGradients guard;
        return impl_->run(request);
    });
}

void Engine::update_weights(const std::map<std::string, at::Tensor>& weights) {
    guarded(Error::Kind::internal, "the weights cannot be updated", [&] {
        const WithoutGradients guard;
        impl_->update(weights);
    });
}

Description describe(const std::string& path) {
    return guarded(Error::Kind::internal, "the engine cannot be read", [&] { return EngineFile(path).description; });
}

std::vector<std::string> mismatches(const Description& engine) {
    return guarded(Error::Kind::internal, "the machine cannot be looked at",
                   [&] { return mismatches(engine, this_machine(TORCH_VERSION)); });
}

at::Generator seeded(std::uint64_t seed) {
    return guarded(Error::Kind::internal, "no generator",
                   [&] { return at::make_generator<at::CPUGeneratorImpl>(seed); });
}

}  // namespace olss
