// What weights the compiled code of an engine relies on: the file weights.json beside it (olss_fast/engine/weights.py).
#pragma once

#include <vector>

#include "container.h"

namespace olss {

// Code takes its weights as memory and looks at nothing, so they must have the names, dtypes, shapes and strides that it
// was compiled for. strides: the manifest's. Throws Error(file).
void check_layout(const TensorView& layout, const std::vector<TensorView>& weights,
                  const std::map<std::string, Shape>& strides);

}  // namespace olss
