// A plan's rows as increments: what olss_fast/executors/increments.py does and explains, operation by operation. Plain
// C++, compiled with -ffp-contract=off.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace olss {

struct Increments {
    std::vector<double> rows;
    bool anchored;
};

namespace increments_detail {

constexpr double growth = 2.0, nothing = 64 * std::numeric_limits<double>::epsilon();

// The column of x_T or a fresh noise with the row's largest coefficient.
inline std::int64_t pivot(const double* row, std::int64_t first_noise, std::int64_t columns) {
    std::int64_t best = 0;
    for (std::int64_t j = first_noise; j < columns; ++j)
        if (std::abs(row[j]) > std::abs(row[best])) best = j;
    return best;
}

// `row` becomes its increment over rho times the row `before`; false if that is impossible.
inline bool take_out(const double* before, double* row, std::int64_t first_noise, std::int64_t columns) {
    const std::int64_t p = pivot(before, first_noise, columns);
    const double rho = before[p] != 0 ? row[p] / before[p] : 0.0;
    double largest = std::abs(rho), allowed = 0;
    for (std::int64_t j = 0; j < columns; ++j) {
        const double carried = rho * before[j], rest = row[j] - carried;
        allowed = std::max(allowed, std::abs(row[j]));
        row[j] = std::abs(rest) <= nothing * (std::abs(row[j]) + std::abs(carried)) ? 0.0 : rest;
        largest = std::max(largest, std::abs(row[j]));
    }
    if (row[0] != 0) return false;
    row[0] = rho;
    return largest <= growth * allowed;
}

}  // namespace increments_detail

inline Increments increments(const std::vector<double>& rows, std::int64_t first_noise, std::int64_t columns) {
    Increments found{rows, true};
    const auto height = static_cast<std::int64_t>(rows.size()) / columns;
    for (std::int64_t k = 1; k < height; ++k)
        if (!increments_detail::take_out(rows.data() + (k - 1) * columns, found.rows.data() + k * columns, first_noise,
                                         columns))
            return {rows, false};
    return found;
}

}  // namespace olss
