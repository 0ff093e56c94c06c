// Prefixes of paths, s_1 = 0 < ... < s_k, kept in a tree, and the errors of the strides that leave them:
//
//     error(j) = min over w of | [x_{s_k}, e_{s_1} .. e_{s_k}] w - x_j |
//
// All tensors of a stride end at component s_k + 1 (the teacher is causal), so only that much of a state can be fitted.
// Every error that counts is the length of an explicit residual. To say which ones count, all strides of a prefix are
// estimated in one pass as |x_j|^2 minus the parts along the orthonormal directions. This cancels, so it is used with
// a bound on its rounding error, and decides nothing that lies within the bound.
#pragma once

#include <deque>
#include <limits>
#include <unordered_map>

#include "trajectory.h"

namespace olss {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double unknown = -1.0;

struct Prefix {
    Index parent, last, depth;  // parent is -1 at the root, depth the number of nodes
    Index support;              // components that can be fitted, padded
    Vector direction;           // e_last made orthonormal to the directions before it; zero where it is collinear
    Vector anchor;              // x_last, the same, to all directions
    Vector remaining;           // by j - last: estimate of |x_j|^2 outside the directions; empty until asked for
    Vector estimate;            // of error(j)^2
    Vector exact;               // error(j), or `unknown`
};

// The farthest stride within a threshold: `next` is -1 if there is none. No threshold below `least_rejected` lets a
// farther one pass.
struct Stride {
    Index next;
    double error, least_rejected;
};

class Prefixes {
  public:
    explicit Prefixes(const Trajectory& trajectory) : trajectory_(trajectory) { clear(); }

    Index root() const { return 0; }
    const Prefix& operator[](Index prefix) const { return prefixes_[prefix]; }
    Index count() const { return prefixes_.size(); }

    // Forgets everything but the root. Indices become invalid.
    void clear() {
        prefixes_.clear();
        children_.clear();
        extend(-1, 0);
    }

    Index child(Index parent, Index next) {
        const Index key = parent * trajectory_.size() + next;
        const auto found = children_.find(key);
        if (found != children_.end()) return found->second;
        return children_[key] = extend(parent, next);
    }

    // A new prefix, which `child` does not find again; the last ones can be dropped.
    Index extend(Index parent, Index last) {
        const Index self = prefixes_.size();
        const Index support = padded(last + 2);
        prefixes_.push_back({parent, last, parent < 0 ? 1 : at(parent).depth + 1, support, {}, {}, {}, {}, {}});
        at(self).exact.assign(trajectory_.size() - last, unknown);
        at(self).direction = unit(trajectory_.column(last + 1, support), parent);
        at(self).anchor = unit(Vector(trajectory_.state(last), trajectory_.state(last) + support), self);
        return self;
    }
    void drop(Index prefix) {
        while (count() > prefix) prefixes_.pop_back();
    }

    double error(Index prefix, Index j) {
        double& known = at(prefix).exact[j - at(prefix).last];
        if (known == unknown) known = residual(prefix, j);
        return known;
    }

    // Bounds on error(j)^2 that cost nothing once the prefix is estimated.
    double estimate(Index prefix, Index j) {
        if (at(prefix).estimate.empty()) estimate_all(prefix);
        return at(prefix).estimate[j - at(prefix).last];
    }
    double uncertainty(Index prefix, Index j) const {
        const Prefix& p = (*this)[prefix];
        const double directions = p.depth + 1, terms = static_cast<double>(p.support / lanes + lanes);
        return 4 * std::numeric_limits<double>::epsilon() * (std::sqrt(directions) * terms + directions) *
               trajectory_.square(j);
    }

    Stride farthest(Index prefix, double threshold) {
        double least_rejected = infinity;
        for (Index j = trajectory_.steps(); j > at(prefix).last; --j) {
            const double lower = estimate(prefix, j) - uncertainty(prefix, j);
            double rejected = lower > 0 ? std::sqrt(lower) : 0.0;
            if (rejected <= threshold) {
                rejected = error(prefix, j);
                if (rejected <= threshold) return {j, rejected, least_rejected};
            }
            least_rejected = std::min(least_rejected, rejected);
        }
        return {-1, infinity, least_rejected};
    }

  private:
    Prefix& at(Index prefix) { return prefixes_[prefix]; }

    // `v` minus its parts along the directions of `prefix`, youngest first: they are orthonormal, so any order does.
    void remove_directions(Vector& v, Index prefix) const {
        for (; prefix >= 0; prefix = (*this)[prefix].parent) {
            const Vector& q = (*this)[prefix].direction;
            remove_part(v.data(), q.data(), q.size());
        }
    }

    // `v` made orthonormal to the directions of `prefix`, or zero. Twice is enough.
    Vector unit(Vector v, Index prefix) const {
        const double before = dot(v.data(), v.data(), v.size());
        remove_directions(v, prefix);
        remove_directions(v, prefix);
        const double after = dot(v.data(), v.data(), v.size());
        const double scale = after > collinear * collinear * before ? 1 / std::sqrt(after) : 0.0;
        for (double& x : v) x *= scale;
        return v;
    }

    double residual(Index prefix, Index j) {
        const Index size = padded(j + 1);
        const Vector& anchor = at(prefix).anchor;
        scratch_.assign(trajectory_.state(j), trajectory_.state(j) + size);
        remove_directions(scratch_, prefix);
        remove_part(scratch_.data(), anchor.data(), anchor.size());
        const double square = dot(scratch_.data(), scratch_.data(), scratch_.size());
        return square > negligible * negligible * trajectory_.square(j) ? std::sqrt(square) : 0.0;
    }

    void estimate_all(Index prefix) {
        Prefix& p = at(prefix);
        if (p.parent >= 0 && at(p.parent).estimate.empty()) estimate_all(p.parent);
        const Index last = p.last, count = trajectory_.size() - last;
        p.remaining.resize(count);
        p.estimate.resize(count);
        project(p.direction.data(), p.anchor.data(), p.support, trajectory_.state(p.last), trajectory_.stride(), count,
                p.remaining.data(), p.estimate.data());
        const double* before = p.parent < 0 ? nullptr : &at(p.parent).remaining[last - at(p.parent).last];
        for (Index i = 0; i < count; ++i) {
            const double square = before ? before[i] : trajectory_.square(p.last + i);
            p.remaining[i] = square - p.remaining[i] * p.remaining[i];
            p.estimate[i] = p.remaining[i] - p.estimate[i] * p.estimate[i];
        }
    }

    const Trajectory& trajectory_;
    std::deque<Prefix> prefixes_;  // references stay valid while it grows
    std::unordered_map<Index, Index> children_;
    Vector scratch_;
};

}  // namespace olss
