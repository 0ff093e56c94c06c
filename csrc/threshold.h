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
    double strides;         // that it takes to arrive, with a fraction for the last or an estimate of those missing
    double final_error;     // of the n-th stride if it went to the end; 0 if fewer do
    Path path;
};

inline Run greedy(Prefixes& prefixes, Index steps, Index end, double threshold) {
    Run run{false, 0.0, infinity, infinity, infinity, {0}};
    Index prefix = prefixes.root(), length = 0;
    for (Index stride = 1;; ++stride) {
        const Stride taken = prefixes.farthest(prefix, threshold);
        run.least_rejected = std::min(run.least_rejected, taken.least_rejected);
        if (taken.next < 0) return run;
        run.largest = std::max(run.largest, taken.error);
        run.feasible = taken.next == end;
        const Index previous = length;
        length = taken.next - run.path.back();
        if (run.feasible) {
            run.strides = stride - 1 + (previous > length ? static_cast<double>(length) / previous : 1.0);
            run.final_error = stride == steps ? taken.error : 0.0;
            return run;
        }
        if (stride == steps) {
            run.strides = steps + static_cast<double>(end - taken.next) / length;
            run.final_error = prefixes.error(prefix, end);
            return run;
        }
        run.path.push_back(taken.next);
        prefix = prefixes.child(prefix, taken.next);
    }
}

// Narrows thresholds down to the least feasible one. A line through one point on either side, in logarithms, says where
// to try next. Far off, the number of strides falls roughly as a power of the threshold. Where it is n on both sides,
// the error of the n-th stride to the end falls steeply, and equals the threshold where that becomes feasible.
class ThresholdSearch {
  public:
    ThresholdSearch(Prefixes& prefixes, Index steps, Index end) : prefixes_(prefixes), steps_(steps), end_(end) {}

    Run least(double guess) {
        if (try_threshold(0.0)) return best_;
        while (!try_threshold(guess)) guess = std::max(2 * guess, infeasible_);
        // Once the interval is narrow, every other round steps to the next error below, or shows it to be infeasible.
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
    static constexpr double narrow_enough = 0.02, least_step = 0.05, widest = 4, usual_power = 3;

    struct Point {  // logarithms: of the threshold, the strides over n, and the final error over the threshold
        double at, strides, excess;
    };

    // Whether the threshold is feasible.
    bool try_threshold(double threshold) {
        if (prefixes_.count() > most_prefixes) prefixes_.clear();
        const Run run = greedy(prefixes_, steps_, end_, threshold);
        const Point point{std::log(threshold), std::log(run.strides / static_cast<double>(steps_)),
                          std::log(run.final_error / threshold)};
        (run.feasible ? above_ : below_) = point;
        if (run.feasible)
            best_ = run;
        else
            infeasible_ = std::max(infeasible_, std::max(threshold, std::nextafter(run.least_rejected, 0.0)));
        return run.feasible;
    }

    // A threshold between the two sides.
    double between(bool middle) const {
        const double high = std::log(best_.largest), low = infeasible_ > 0 ? std::log(infeasible_) : high - widest;
        const auto crossing = [&](double below, double above) {
            return above_.at + (below_.at - above_.at) * above / (above - below);
        };
        double wanted = above_.at + usual_power * above_.strides;
        if (std::isfinite(below_.at)) {
            wanted = crossing(below_.strides, above_.strides);
            if (std::isfinite(above_.excess)) wanted = crossing(below_.excess, above_.excess);
            if (middle || !std::isfinite(wanted)) wanted = (low + high) / 2;
        }
        const double margin = least_step * (high - low);
        return std::exp(std::min(high - margin, std::max(low + margin, wanted)));
    }

    static constexpr Index most_prefixes = 1024;
    Prefixes& prefixes_;
    Index steps_, end_;
    Run best_{};
    double infeasible_ = 0;  // no threshold up to it is known to be feasible
    Point below_{}, above_{};
};

}  // namespace olss
