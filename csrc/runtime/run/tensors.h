// Names of dtypes, and tensors of memory that somebody else owns.
#pragma once

#include <ATen/core/Tensor.h>

#include "files/container.h"

namespace olss {

// "float32" -> at::kFloat. Throws Error(internal) for another name.
at::ScalarType dtype_named(const std::string& name);
std::string name_of(at::ScalarType dtype);

// A tensor of its own with the values of the view: in C order, or with `strides`, which fill dense memory.
at::Tensor copied(const TensorView& view, const Shape* strides = nullptr);

}  // namespace olss
