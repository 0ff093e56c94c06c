// One step of a plan on the host in one pass, as kernels/step.py says: guidance, history, next row. Plain C++.
//
// Between two network calls the caches hold nothing of ours, and each small operation costs tens of microseconds. So
// this is one. Sums run over the columns in their order, element by element: the same bits wherever it is compiled
// (with -ffp-contract=off), whatever the vector length.
#pragma once

#include <algorithm>
#include <cstddef>

namespace olss {

// Columns of `size` elements, `stride` apart; the first `known` are there once `output` is in. Then `noises` columns
// from noise_start on. first: what stands in column 0, the initial noise or x as it is.
// output: (2, size) where doubled, unconditional first; nullptr: none, as for row 0.
template <typename T>
struct StepColumns {
    T* history;
    const T* first;
    std::ptrdiff_t stride, size, known, noise_start, noises;
    int branches;
    bool doubled;
};

namespace step_detail {

constexpr std::ptrdiff_t block = 1024;  // elements whose sums stay in the first cache

// The output of one block into its history column(s).
template <typename T>
void keep(const StepColumns<T>& in, const T* output, T guidance, std::ptrdiff_t begin, std::ptrdiff_t count) {
    T* slot = in.history + (in.known - in.branches) * in.stride + begin;
    const T* first = output + begin;
    const T* second = first + in.size;
    if (in.doubled && in.branches == 1) {
        for (std::ptrdiff_t i = 0; i < count; ++i) slot[i] = first[i] + guidance * (second[i] - first[i]);
        return;
    }
    std::copy(first, first + count, slot);
    if (in.branches == 2) std::copy(second, second + count, slot + in.stride);
}

template <typename T>
void add(T* sums, const T* column, T weight, std::ptrdiff_t count) {
    for (std::ptrdiff_t i = 0; i < count; ++i) sums[i] += weight * column[i];
}

}  // namespace step_detail

// x = sum of weights[j] column[j] over the known columns and the noises; both halves of x where doubled.
template <typename T>
void host_step(const StepColumns<T>& in, const T* output, T guidance, const T* weights, T* x) {
    T sums[step_detail::block];
    for (std::ptrdiff_t begin = 0; begin < in.size; begin += step_detail::block) {
        const std::ptrdiff_t count = std::min(step_detail::block, in.size - begin);
        if (output != nullptr) step_detail::keep(in, output, guidance, begin, count);
        std::fill(sums, sums + count, T(0));
        step_detail::add(sums, in.first + begin, weights[0], count);
        for (std::ptrdiff_t j = 1; j < in.known; ++j)
            step_detail::add(sums, in.history + j * in.stride + begin, weights[j], count);
        for (std::ptrdiff_t j = in.noise_start; j < in.noise_start + in.noises; ++j)
            step_detail::add(sums, in.history + j * in.stride + begin, weights[j], count);
        std::copy(sums, sums + count, x + begin);
        if (in.doubled) std::copy(sums, sums + count, x + in.size + begin);
    }
}

}  // namespace olss
