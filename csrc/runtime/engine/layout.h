// The layout that an engine's compiled code relies on: the file weights.json beside it (olss_fast/engine/weights.py).
#pragma once

#include <vector>

#include "files/container.h"

namespace olss {

// Code reads its inputs and weights as raw memory without checks, so the manifest and the weights, with their names,
// dtypes, shapes and strides, must be those that it was compiled for. strides: the manifest's. Throws Error(file).
void check_compiled_for(const TensorView& layout, const Json& manifest, const std::vector<TensorView>& weights,
                        const std::map<std::string, Shape>& strides);

}  // namespace olss
