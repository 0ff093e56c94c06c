// The description of an engine file, and the errors of this library. Needs only the standard library.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace olss {

// Every failure of this library. what() says what came, what was expected, and what to do.
class Error : public std::runtime_error {
  public:
    enum class Kind {
        file,     // an engine, .npy or image file cannot be read or written: damaged, truncated, altered, disk full
        version,  // an engine file of a newer format
        machine,  // an engine that was built for another machine or torch
        input,    // a request: noise, conditioning, plan, guidance, weights, options
        network,  // the compiled network failed, or returned NaN or infinity
        internal  // none of these: out of memory, or a fault of this library
    };
    Error(Kind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
    Kind kind() const { return kind_; }

  private:
    Kind kind_;
};

using Shape = std::vector<std::int64_t>;

// Sizes of the noise (B, …): size s of axis i fits if min[i] <= s <= max[i] and s is a multiple of multiple[i].
struct Profile {
    Shape min, opt, max, multiple;
};

// One conditioning argument. shape is without the axis of the samples, which is the first one where per_sample.
struct Input {
    std::string name, dtype;
    bool per_sample = false;
    Shape shape;
};

struct PlanEntry {
    std::string name;
    std::int64_t nfe = 0, branches = 1, noises = 0;
    std::string sha256;
};

struct Machine {
    std::string device, name, system, architecture;
    Shape capability;                       // of CUDA, else empty
    std::vector<std::string> instructions;  // all of them must be there
};

// dtypes are named as in torch: "float32", "int64". The first plan is the default.
struct Description {
    std::string notice, network, dtype;
    std::map<std::string, std::string> built_with;  // versions of olss_fast, torch, …; empty where there was none
    Machine machine;
    Profile profile;
    bool doubled = false;  // the network gets both halves of a guided pair
    double guidance_scale = 1.0;
    std::vector<Input> inputs;
    std::map<std::string, std::string> fixed;  // arguments that were baked in, for people
    std::vector<PlanEntry> plans;
    std::map<std::string, Shape> strides;  // of weights that the code wants in another order than C order
    std::vector<std::string> unused;       // names of a state_dict that the code does not read
    std::map<std::string, std::string> tied;  // second names of weights: name -> the name that the code reads
    std::map<std::string, std::string> hashes;
    std::map<std::string, double> measured;
};

}  // namespace olss
