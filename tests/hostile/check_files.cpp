// Reads files of unknown origin as the C++ runtime does, without torch, so that sanitizers can watch.
//
// Paths come on standard input, one a line; for each a line goes out: "ok", or the error's kind and message. Any other
// exception, and whatever a sanitizer finds, ends the program with another exit code than 0.
#include <iostream>

#include "engine_file.h"
#include "npy.h"

int main() {
    for (std::string path; std::getline(std::cin, path);) {
        try {
            if (path.size() > 4 && path.substr(path.size() - 4) == ".npy") olss::read_npy(path);
            else olss::EngineFile file(path);
            std::cout << "ok\n";
        } catch (const olss::Error& error) {
            std::cout << static_cast<int>(error.kind()) << " " << error.what() << "\n";
        }
    }
}
