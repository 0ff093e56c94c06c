// The compiled network of an engine file, mapped into this process with its weights.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>

#include "engine/engine_file.h"

namespace olss {

class CompiledNetwork {
  public:
    // Writes the code into a private folder, maps it, and removes the folder. Throws Error(file).
    CompiledNetwork(const EngineFile& file, std::size_t runs_at_once);

    // x, time, then the conditioning -> the raw output. Nothing is checked. Any number of threads; Error(network).
    at::Tensor operator()(std::vector<at::Tensor> inputs) const;

    // The weights that the code reads in place, by the names of the network's state_dict.
    const std::map<std::string, at::Tensor>& weights() const { return weights_; }

  private:
    std::map<std::string, at::Tensor> weights_;
    std::unique_ptr<torch::inductor::AOTIModelContainerRunnerCpu> runner_;
};

}  // namespace olss
