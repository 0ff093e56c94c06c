// Checks whether an engine fits this machine.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "olss_description.h"

namespace olss {

// This machine, as relevant to compiled code.
struct Here {
    std::string system, architecture;    // as uname names them
    std::set<std::string> instructions;  // of the processor, as Linux names them; empty if unknown
    std::string torch;                   // the version that this library was built against
};

Here this_machine(const std::string& torch_version);

// Each reason why the engine cannot run there, with what to do; none if it can.
std::vector<std::string> mismatches(const Description& engine, const Here& here);

}  // namespace olss
