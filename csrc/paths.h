// Paths s_1 = 0 < ... < s_n < T: their stride errors, and the planned one.
#pragma once

#include "exhaustive.h"

namespace olss {

struct PlannedPath {
    Path path;
    double threshold;  // the least feasible one
    bool proven;       // true if none below is feasible; otherwise only none just below
};

inline Path uniform_path(Index end, Index steps) {
    Path path;
    for (Index i = 0; i < steps; ++i) path.push_back(i * end / steps);
    return path;
}

inline Vector stride_errors(Prefixes& prefixes, const Path& path, Index end) {
    Vector errors;
    Index prefix = prefixes.root();
    for (std::size_t k = 1; k <= path.size(); ++k) {
        errors.push_back(prefixes.error(prefix, k < path.size() ? path[k] : end));
        if (k < path.size()) prefix = prefixes.child(prefix, path[k]);
    }
    return errors;
}

// Divides the worst stride that has a state inside (the longest of equal ones), where the worse half is best
// (nearest to the middle of equal ones).
inline void split_worst_stride(Prefixes& prefixes, Path& path, Index end) {
    const Vector errors = stride_errors(prefixes, path, end);
    const auto stop = [&](std::size_t k) { return k + 1 < path.size() ? path[k + 1] : end; };
    std::size_t worst = path.size();
    for (std::size_t k = 0; k < path.size(); ++k) {
        if (stop(k) - path[k] < 2) continue;
        if (worst == path.size() || errors[k] > errors[worst] ||
            (errors[k] == errors[worst] && stop(k) - path[k] > stop(worst) - path[worst]))
            worst = k;
    }
    Index prefix = prefixes.root(), best = -1;
    for (std::size_t k = 1; k <= worst; ++k) prefix = prefixes.child(prefix, path[k]);
    double best_error = infinity;
    const Index first = path[worst], last = stop(worst);
    for (Index j = first + 1; j < last; ++j) {
        const double error = std::max(prefixes.error(prefix, j), prefixes.error(prefixes.child(prefix, j), last));
        const auto off_centre = [&](Index i) { return std::abs(2 * i - first - last); };
        if (best < 0 || error < best_error || (error == best_error && off_centre(j) < off_centre(best))) {
            best = j;
            best_error = error;
        }
    }
    path.insert(path.begin() + static_cast<Index>(worst) + 1, best);
}

// The path of `steps` nodes with the least feasible threshold. `most_visits` bounds the proof that it is the least.
inline PlannedPath plan_path(const Trajectory& trajectory, Index steps, Index most_visits) {
    const Index end = trajectory.steps();
    Prefixes prefixes(trajectory);
    const Vector uniform = stride_errors(prefixes, uniform_path(end, steps), end);
    Run run = ThresholdSearch(prefixes, steps, end).least(*std::max_element(uniform.begin(), uniform.end()));
    bool proven = run.largest == 0;
    if (!proven && most_visits > 0) {
        ExhaustiveSearch search(trajectory, steps, run, most_visits);
        run = search.least();
        proven = search.proven();
    }
    while (static_cast<Index>(run.path.size()) < steps) split_worst_stride(prefixes, run.path, end);
    return {run.path, run.largest, proven};
}

}  // namespace olss
