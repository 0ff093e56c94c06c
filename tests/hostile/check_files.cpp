// Reads files of unknown origin as the C++ runtime does, without torch, so that sanitizers can watch.
//
// With the version of a torch as its argument it also tells whether engines fit this machine. Paths come on standard input, one a line; for each a line goes out: "ok", or the error's kind and message. Any other
// exception, and whatever a sanitizer finds, ends the program with another exit code than 0.
#include <iostream>

#include "engine/engine_file.h"
#include "engine/machine.h"
#include "files/npy.h"

void check_engine(const olss::Description& engine, const char* torch) {
    const std::vector<std::string> reasons =
        torch ? mismatches(engine, olss::this_machine(torch)) : std::vector<std::string>{};
    if (!reasons.empty()) throw olss::Error(olss::Error::Kind::machine, reasons.front());
}

int main(int count, char** words) {
    for (std::string path; std::getline(std::cin, path);) {
        try {
            if (path.size() > 4 && path.substr(path.size() - 4) == ".npy") olss::read_npy(path);
            else check_engine(olss::EngineFile(path).description, count > 1 ? words[1] : nullptr);
            std::cout << "ok\n";
        } catch (const olss::Error& error) {
            std::cout << static_cast<int>(error.kind()) << " " << error.what() << "\n";
        }
    }
}
