// The path whose largest stride error is as small as greedy strides can make it.
//
// Greedy(D): from every prefix take the farthest next state whose error is at most D. D is feasible if n strides reach
// the end. A run depends on D only through comparisons, so it stays the same from the largest error that it accepted
// up to the least that it rejected: the least feasible D is one of the errors, and is found exactly.
#pragma once

#include "prefixes.h"

namespace olss {

struct Run {
    bool feasible;
    double largest;         // error of the worst stride taken; the same run results from every threshold down to it
    double least_rejected;  // and, below this, up
    double final_error;     // of the n-th stride, were it to go to the end (0 if fewer strides do)
    Path path;
};

inline Run greedy(Prefixes& prefixes, Index steps, Index end, double threshold) {
    Run run{false, 0.0, infinity, infinity, {0}};
    Index prefix = prefixes.root();
    for (Index stride = 1;; ++stride) {
        const Stride taken = prefixes.farthest(prefix, threshold);
        run.least_rejected = std::min(run.least_rejected, taken.least_rejected);
        if (taken.next >= 0) run.largest = std::max(run.largest, taken.error);
        run.feasible = taken.next == end;
        if (run.feasible) run.final_error = stride == steps ? taken.error : 0.0;
        if (!run.feasible && stride == steps) run.final_error = prefixes.error(prefix, end);
        if (run.feasible || stride == steps || taken.next < 0) return run;
        run.path.push_back(taken.next);
        prefix = prefixes.child(prefix, taken.next);
    }
}

// Narrows thresholds down to the least feasible one. Two points guide it, one on either side: the logarithm of
// final_error / threshold changes sign where thresholds become feasible, and falls steeply there.
class ThresholdSearch {
  public:
    ThresholdSearch(Prefixes& prefixes, Index steps, Index end) : prefixes_(prefixes), steps_(steps), end_(end) {}

    Run least(double guess) {
        if (try_threshold(0.0)) return best_;
        while (!have_best_) {
            if (try_threshold(guess)) break;
            guess = std::max(2 * guess, infeasible_);
        }
        // Each round halves the interval, or at least steps to the next error below the best threshold.
        for (Index round = 0;; ++round) {
            const double below = std::nextafter(best_.largest, 0.0);
            if (infeasible_ >= below) return best_;
            const bool narrow = infeasible_ > 0 && std::log(best_.largest / infeasible_) < narrow_enough;
            if (narrow && round % 2) {
                if (!try_threshold(below)) return best_;
            } else {
                try_threshold(std::min(below, between(round % 3 == 2)));
            }
        }
    }

  private:
    static constexpr double narrow_enough = 0.02, least_step = 0.05;

    bool try_threshold(double threshold) {
        if (prefixes_.count() > most_prefixes) prefixes_.clear();
        Run run = greedy(prefixes_, steps_, end_, threshold);
        const double height = std::log(run.final_error / threshold);
        if (run.feasible) {
            best_ = std::move(run);
            have_best_ = true;
            above_ = height;
            at_above_ = threshold;
        } else {
            infeasible_ = std::max(infeasible_, std::max(threshold, std::nextafter(run.least_rejected, 0.0)));
            below_ = height;
            at_below_ = threshold;
        }
        return have_best_ && best_.largest <= threshold;
    }

    double between(bool middle) const {
        const double low = infeasible_ > 0 ? std::log(infeasible_) : std::log(best_.largest) - 4;
        const double high = std::log(best_.largest), width = high - low;
        double part = 0.5;
        if (!middle && std::isfinite(below_) && std::isfinite(above_) && below_ > above_) {
            const double x = std::log(at_below_), y = std::log(at_above_);
            part = (x + (y - x) * below_ / (below_ - above_) - low) / width;
        }
        return std::exp(low + width * std::min(1 - least_step, std::max(least_step, part)));
    }

    static constexpr Index most_prefixes = 1024;
    Prefixes& prefixes_;
    Index steps_, end_;
    Run best_{};
    bool have_best_ = false;
    double infeasible_ = 0;  // no threshold up to it is known to be feasible
    double below_ = infinity, above_ = -infinity, at_below_ = 0, at_above_ = 0;
};

}  // namespace olss
