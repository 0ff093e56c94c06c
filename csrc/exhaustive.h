// Proof that a threshold is the least feasible one, or a lesser one.
//
// Feasibility need not be monotone: a greedy run with a larger threshold may reach less far later on. The thresholds
// for which a run starts with a given prefix are an interval; the next strides divide it. This tree of intervals is
// searched from small thresholds to large ones, and cut where even the best conceivable strides end too early: what
// lies beyond component s + 1 of a state cannot be fitted from states up to s.
#pragma once

#include "threshold.h"

namespace olss {

class ExhaustiveSearch {
  public:
    // `best` is a feasible run: only thresholds below its largest error are searched. At most `most_visits` prefixes
    // are visited.
    ExhaustiveSearch(const Trajectory& trajectory, Index steps, Run best, Index most_visits)
        : trajectory_(trajectory), prefixes_(trajectory), steps_(steps), best_(std::move(best)),
          visits_left_(most_visits), beyond_(trajectory.size() * trajectory.size()) {
        for (Index j = 0; j < trajectory.size(); ++j) {
            double square = 0;
            for (Index i = j; i >= 0; --i) {
                square += trajectory.state(j)[i] * trajectory.state(j)[i];
                beyond_[i * trajectory.size() + j] = std::sqrt(square) - rounding * std::sqrt(trajectory.square(j));
            }
        }
    }

    Run least() {
        Path path{0};
        explore(prefixes_.root(), path, 0.0, best_.largest);
        return best_;
    }

    // Whether the search was complete within `most_visits`.
    bool proven() const { return visits_left_ >= 0; }

  private:
    struct Choice {
        Index next;
        double low, high;  // it is taken for thresholds from `low` to below `high`
    };
    static constexpr double rounding = 2 * negligible;

    // Follows all runs that start with `path`, for thresholds from `low` to below `high`.
    void explore(Index prefix, Path& path, double low, double high) {
        if (--visits_left_ < 0) return;
        for (const Choice& choice : choices(prefix, low, std::min(high, best_.largest))) {
            if (choice.low >= best_.largest) return;
            if (choice.next == trajectory_.steps()) {
                best_.largest = choice.low;
                best_.path = path;
                return;
            }
            const Index left = steps_ - static_cast<Index>(path.size());
            if (left == 0 || !within_reach(choice.next, left, std::min(choice.high, best_.largest))) continue;
            const Index child = prefixes_.extend(prefix, choice.next);
            path.push_back(choice.next);
            explore(child, path, choice.low, choice.high);
            path.pop_back();
            prefixes_.drop(child);
        }
    }

    // What greedy takes from a prefix as the threshold rises from `low` to `high`, nearest first.
    std::vector<Choice> choices(Index prefix, double low, double high) {
        std::vector<Choice> found;
        for (Index j = trajectory_.steps(); j > prefixes_[prefix].last && low < high; --j) {
            const double lower = prefixes_.estimate(prefix, j) - prefixes_.uncertainty(prefix, j);
            if (lower > high * high) continue;
            const double error = prefixes_.error(prefix, j);
            if (error >= high) continue;
            found.push_back({j, std::max(error, low), high});
            high = error;
        }
        std::reverse(found.begin(), found.end());
        return found;
    }

    bool within_reach(Index from, Index strides, double threshold) const {
        Index reached = from;
        for (; strides > 0 && reached < trajectory_.steps(); --strides) {
            const Index support = std::min(reached + 2, trajectory_.size());
            Index j = trajectory_.steps();
            while (j >= support && beyond_[support * trajectory_.size() + j] > threshold) --j;
            reached = std::max(reached + 1, j);
        }
        return reached == trajectory_.steps();
    }

    const Trajectory& trajectory_;
    Prefixes prefixes_;
    Index steps_;
    Run best_;
    Index visits_left_;
    Vector beyond_;  // by component and state: the length from that component on, at least
};

}  // namespace olss
