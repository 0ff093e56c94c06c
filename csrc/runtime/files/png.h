// Samples as a PNG image, as olss_fast/report/images.py makes it.
#pragma once

#include <cstdint>
#include <string>

namespace olss {

// 8 bits a channel; grey (1 channel) or RGB (3), pixel after pixel, row after row.
struct Image {
    std::int64_t height, width, channels;
    std::string pixels;
};

// `images`: (count, channels, height, width) in [-1, 1], clamped and rounded; NaN is grey. They lie in a nearly square
// grid, row by row, 2 white pixels apart.
Image grid_of(const double* images, std::int64_t count, std::int64_t channels, std::int64_t height, std::int64_t width);

// The content of a PNG file, not compressed.
std::string png_file(const Image& image);

}  // namespace olss
