// Values of the command line as tensors, and tensors as files.
#pragma once

#include <string>

#include "olss.h"

namespace olss {

// `text` is a number, numbers with commas, or @file.npy. One number stands for all; the values of one sample stand for
// every sample. They must be exactly values of the input's dtype (floating point may round). Throws Error: input, file.
at::Tensor parse_value(const Input& input, const std::string& text, std::int64_t samples, const std::string& option);

// .npy or .png, by the name's end, which check_out has seen before anything was run. Throws Error: input, file.
void check_out(const std::string& path, const Profile& profile);
void write_samples(const at::Tensor& samples, const std::string& path);

}  // namespace olss
