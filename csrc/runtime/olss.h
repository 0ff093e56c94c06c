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
    std::optional<std::string> sha256;  // that the file ought to have, as sha256sum prints it, in either case of letters
};

// What to sample. Tensors are on the CPU and of the dtypes and shapes that Engine::describe() tells.
struct Request {
    at::Tensor noise;  // (B, …) unit Gaussian, contiguous
    std::map<std::string, at::Tensor> conditioning;
    std::map<std::string, at::Tensor> unconditional;  // takes the place of the engine's own, name by name
    std::optional<std::int64_t> steps;                // the first plan of that many evaluations …
    std::optional<std::string> plan;                  // … or the plan of that name; default: the first plan
    std::optional<double> guidance_scale;             // default: the engine's
    at::Generator generator;  // draws the fresh noises of a stochastic plan; default: torch's global one
};

// A network compiled ahead of time, with its weights and plans. Copies share them. Any number of threads may call run
// at the same time.
class Engine {
  public:
    // THE FILE'S MACHINE CODE IS RUN. Load only what comes from somebody you trust. Before any of it is run the file is
    // verified as a whole (it holds what was written, whoever wrote it) and compared with this machine.
    static Engine load(const std::string& path, const Options& options = {});
    static Engine load(EngineFile file, const Options& options = {});

    const Description& describe() const;

    // The samples (B, …), of the noise's dtype. Errors: input, and network where an output is not finite.
    at::Tensor run(const Request& request) const;

    // Writes other weights over those in use; the names are those of the network's state_dict, some may be left out.
    // All are checked before the first is written. Waits until no run is going on, and holds up those that follow.
    void update_weights(const std::map<std::string, at::Tensor>& weights);

  private:
    struct Impl;
    explicit Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
    std::shared_ptr<Impl> impl_;
};

// What a file says of itself, after all of it was verified; none of its code is loaded.
Description describe(const std::string& path);

// Each reason why an engine cannot run here, with what to do; none if it can.
std::vector<std::string> mismatches(const Description& engine);

// A generator of its own on the CPU: the same numbers as torch.Generator().manual_seed(seed).
at::Generator seeded(std::uint64_t seed);

}  // namespace olss
