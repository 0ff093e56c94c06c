// NumPy's .npy files (numpy.lib.format, versions 1 to 3), in C order and little-endian.
#pragma once

#include <string>
#include <string_view>

#include "olss_description.h"

namespace olss {

struct Npy {
    std::string dtype;  // "float32", …: float64, float32, float16, int64, int32, int16, int8, uint8, bool
    Shape shape;
    std::string data;
};

Npy parse_npy(std::string_view file);    // throws Error(file)
Npy read_npy(const std::string& path);   // throws Error(file)
std::string npy_file(const Npy& array);  // the content of a file

}  // namespace olss
