// What the compiled code of an engine relies on: the file weights.json beside it (olss_fast/engine/weights.py).
#pragma once

#include <vector>

#include "container.h"

namespace olss {

// Code takes its inputs and weights as memory and looks at nothing, so the manifest and the weights, with their names,
// dtypes, shapes and strides, must be those that it was compiled for. strides: the manifest's. Throws Error(file).
void check_compiled_for(const TensorView& layout, const Json& manifest, const std::vector<TensorView>& weights,
                        const std::map<std::string, Shape>& strides);

}  // namespace olss
