// A Description for people.
#pragma once

#include <string>

#include "olss_description.h"

namespace olss {

// Facts, inputs and plans, line by line, and each of `reasons` why the engine does not fit.
std::string text_of(const Description& engine, const std::vector<std::string>& reasons);

}  // namespace olss
