// Runs engine files (`olss_fast.build`) without Python. Link olss_runtime and libtorch; see docs/runtime.md.
//
//     const olss::Engine engine = olss::Engine::load("demo.olss");
//     at::Generator generator = olss::seeded(1);
//     olss::Request request;
//     request.noise = at::randn({4, 1, 32, 32}, generator);
//     request.conditioning["class_labels"] = at::full({4}, 3, at::kLong);
//     at::Tensor images = engine.run(request);
//
// Everything throws olss::Error and nothing else.
#pragma once

#include <memory>
#include <optional>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include "olss_description.h"

namespace olss {

struct EngineFile;

struct Options {
    std::size_t runs_at_once = 0;  // network calls that may run at the same time, others wait; 0: hardware threads
    std::optional<std::string> sha256;  // expected, as sha256sum prints it, in upper or lower case
};

// What to sample. Tensors are on the CPU and have the dtypes and shapes given by Engine::describe().
struct Request {
    at::Tensor noise;  // (B, …) unit Gaussian, contiguous
    std::map<std::string, at::Tensor> conditioning;
    std::map<std::string, at::Tensor> unconditional;  // replaces the engine's own, name by name
    std::optional<std::int64_t> steps;                // the first plan of that many evaluations …
    std::optional<std::string> plan;                  // … or the plan of that name; default: the first plan
    std::optional<double> guidance_scale;             // default: the engine's
    at::Generator generator;  // draws the fresh noises of a stochastic plan; default: torch's global one
};

// A network compiled ahead of time, with its weights and plans. Copies share them. Any number of threads may call run
// at the same time.
class Engine {
  public:
    // THE FILE'S MACHINE CODE IS RUN. Load only files from somebody you trust. Before any of it is run, the whole file is
    // verified (that it is as written, not who wrote it) and compared with this machine.
    static Engine load(const std::string& path, const Options& options = {});
    static Engine load(EngineFile file, const Options& options = {});

    const Description& describe() const;

    // The samples (B, …), of the noise's dtype. Errors: input, and network where an output is not finite.
    at::Tensor run(const Request& request) const;

    // Writes other weights over those in use; the names are those of the network's state_dict, some may be left out.
    // All are checked before the first is written. Waits for current runs, and blocks new ones meanwhile.
    void update_weights(const std::map<std::string, at::Tensor>& weights);

  private:
    struct Impl;
    explicit Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
    std::shared_ptr<Impl> impl_;
};

// The description in a file, after verifying all of it; none of its code is loaded.
Description describe(const std::string& path);

// Each reason why an engine cannot run here, with what to do; none if it can.
std::vector<std::string> mismatches(const Description& engine);

// A new generator on the CPU: the same numbers as torch.Generator().manual_seed(seed).
at::Generator seeded(std::uint64_t seed);

}  // namespace olss
