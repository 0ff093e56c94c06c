#include "engine/machine.h"

#include <fstream>
#include <sstream>

#include <sys/utsname.h>

#include "files/text.h"

namespace olss {

namespace {

std::set<std::string> processor_instructions() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
        std::istringstream words(line.substr(line.find(':') + 1));
        std::set<std::string> result;
        for (std::string word; words >> word;) result.insert(word);
        return result;
    }
    return {};
}

// "2.13" of "2.13.0+cpu": code compiled ahead of time relies on the layout of torch's own structures.
std::string series(const std::string& version) {
    const std::string numbers = version.substr(0, version.find('+'));
    return numbers.substr(0, numbers.find('.', numbers.find('.') + 1));
}

}  // namespace

Here this_machine(const std::string& torch_version) {
    struct utsname names = {};
    ::uname(&names);
    return {names.sysname, names.machine, processor_instructions(), torch_version};
}

std::vector<std::string> mismatches(const Description& engine, const Here& here) {
    std::vector<std::string> reasons;
    const auto compare = [&](const char* what, const std::string& wanted, const std::string& found,
                             const char* advice) {
        if (wanted != found)
            reasons.push_back(
                concat(what, " is ", quote(found), " and the engine was built for ", quote(wanted), "; ", advice));
    };
    const auto torch = engine.built_with.find("torch");
    compare("torch", torch == engine.built_with.end() ? "" : series(torch->second), series(here.torch),
            "build the engine again, or build this runtime with that torch");
    compare("the system", engine.machine.system, here.system, "build the engine on such a system");
    compare("the architecture", engine.machine.architecture, here.architecture, "build the engine on such a machine");
    compare("the device of this runtime", engine.machine.device, "cpu",
            "run it from Python, with olss_fast.load_engine");
    std::vector<std::string> missing;
    for (const std::string& each : engine.machine.instructions)
        if (!here.instructions.count(each)) missing.push_back(quote(each));
    if (!missing.empty())
        reasons.push_back("the processor lacks the instructions " + listed(missing) +
                          "; build the engine on this machine");
    return reasons;
}

}  // namespace olss
