// The sampling loop: olss_fast/executors/fused.py and kernels/step.py on the CPU, operator by operator, with bitwise
// equal results. The equations and symbols are those of kernels/step.py.
#pragma once

#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "engine/plan.h"

namespace olss {

// A plan as the loop reads it.
struct Tables {
    // For data of `dtype`: coefficients in float32, or in float64 for float64.
    Tables(const Plan& plan, at::ScalarType dtype);

    std::int64_t nfe, branches, noises;
    at::Tensor rows, timesteps;              // (S+1, columns); (S+1,) float32, the last one is no time
    std::vector<std::int64_t> noise_counts;  // how many of the noises each row reads
    bool anchored;                           // whether column 0 of the rows is x itself, but for row 0
};

// The raw output of the network for x (N, …) and time (N,) float32; N = 2B where `doubled`, unconditional half first.
using Network = std::function<at::Tensor(const at::Tensor& x, const at::Tensor& time)>;

// The samples (B, …) of `noise`. step_noise: (Z, B, …) float32 for a plan with fresh noises, else not defined.
// Throws Error(network) that names the first evaluation whose output is not finite, or has another shape than x.
at::Tensor sample(const Tables& plan, const Network& network, const at::Tensor& noise, const at::Tensor& step_noise,
                  bool doubled, double guidance_scale);

}  // namespace olss
