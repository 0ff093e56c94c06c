// The command line of olss-run.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "olss_description.h"

namespace olss {

struct Arguments {
    std::string engine, out;
    bool describe = false, help = false, version = false;
    std::optional<std::int64_t> steps;
    std::optional<std::string> plan, sha256;
    std::optional<double> guidance_scale;
    std::int64_t seed = 0, count = 1, threads = 0, repeat = 1, at_once = 1;
    std::optional<Shape> shape;                             // without the axis of the samples
    std::map<std::string, std::string> set, unconditional;  // name -> value as written
};

// Throws Error(input): an unknown option, one without its value or given twice, an invalid value.
Arguments parse_arguments(const std::vector<std::string>& words);

extern const char* const usage;

// "3,7" as numbers of the type; nothing but digits, signs, and for double a point and exponent. Throws Error(input).
template <typename Number>
std::vector<Number> parse_numbers(const std::string& text, const std::string& what);

}  // namespace olss
