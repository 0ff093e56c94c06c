// The teacher's run as short vectors: what was recorded is basis = Q R, so every tensor that is a combination of the
// recorded ones is a combination of the columns of R, and all inner products are kept.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "kernels.h"

namespace olss {

using Vector = std::vector<double>;
using Path = std::vector<Index>;  // teacher evaluations 0 = s_1 < ... < s_n < T

// Below this part of its own length a vector is rounding, not direction: what is left of a column after the others
// are taken out, and what is left of a state after a stride is fitted.
constexpr double collinear = 1e-10;
constexpr double negligible = 1e-12;

class Trajectory {
  public:
    // `r`: (T+1, T+1) upper triangular, columns [x_T | f_0 .. f_{T-1}]. `rows`: (T+1, T+1), state j is r . rows[j], and
    // rows[j] is zero beyond column j. Both row-major; `r` must outlive this object.
    Trajectory(const double* r, const double* rows, Index steps)
        : r_(r), size_(steps + 1), stride_((size_ / tile_columns + 1) * tile_columns),
          states_(size_ * stride_), squares_(size_) {
        for (Index first = 0; first < size_; first += tile_columns) multiply_panel(rows, first);
        for (Index j = 0; j < size_; ++j) squares_[j] = dot(state(j), state(j), padded(j + 1));
    }

    Index steps() const { return size_ - 1; }
    Index size() const { return size_; }
    Index stride() const { return stride_; }

    // State j: zero from component j + 1 to stride().
    const double* state(Index j) const { return &states_[j * stride_]; }
    double square(Index j) const { return squares_[j]; }

    // Column c of R (0 is the initial noise, 1 + i the output of evaluation i), c + 1 components, in `size` or more.
    Vector column(Index c, Index size) const {
        Vector v(padded(size), 0.0);
        for (Index i = 0; i <= c; ++i) v[i] = r_[i * size_ + c];
        return v;
    }

  private:
    // Components [first, first + 16) of all states; they are zero before state `first`.
    void multiply_panel(const double* rows, Index first) {
        Vector panel((size_ - first) * tile_columns, 0.0);
        for (Index i = first; i < std::min(size_, first + tile_columns); ++i)
            for (Index c = i; c < size_; ++c) panel[(c - first) * tile_columns + i - first] = r_[i * size_ + c];
        Index j = first;
        for (; j + tile_rows <= size_; j += tile_rows)
            multiply_tile(rows + j * size_ + first, size_, panel.data(), j + tile_rows - first,
                          &states_[j * stride_ + first], stride_);
        for (; j < size_; ++j)
            for (Index c = first; c <= j; ++c)
                for (Index i = 0; i < tile_columns; ++i)
                    states_[j * stride_ + first + i] += rows[j * size_ + c] * panel[(c - first) * tile_columns + i];
    }

    const double* r_;
    Index size_, stride_;
    Vector states_, squares_;
};

}  // namespace olss
