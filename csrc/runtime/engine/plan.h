// A plan file (olss_fast/plan/file.py) as tables. The rules of a plan are those of olss_fast/plan/plan.py.
#pragma once

#include <vector>

#include "files/container.h"

namespace olss {

// S evaluations: row i < S of `rows` forms the input of evaluation i over [x_T | outputs | fresh noises], row S the
// sample.
struct Plan {
    std::int64_t nfe = 0, branches = 1, columns = 0;
    std::vector<double> timesteps;  // (S,)
    std::vector<double> rows;       // (S+1, columns)

    std::int64_t first_noise() const { return 1 + nfe * branches; }
    std::int64_t noises() const { return columns - first_noise(); }
};

// The plan in the content of a plan file. Throws Error(file): whatever the format or a Plan forbids, and plans that use
// several networks, of which an engine has one.
Plan parse_plan(const TensorView& file);

}  // namespace olss
