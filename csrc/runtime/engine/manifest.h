// The manifest of an engine file as a Description.
#pragma once

#include "files/json.h"
#include "olss_description.h"

namespace olss {

// Every member is there, of the right type and within bounds, and no other. Throws Error(file).
Description description_of(const Json& manifest);

}  // namespace olss
