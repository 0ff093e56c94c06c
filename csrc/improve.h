// Paths near a given one with a smaller deployed error, while every stride stays within a bound, without which the
// states in between could not be reached.
#pragma once

#include "paths.h"
#include "span.h"

namespace olss {

struct Scored {
    Path path;
    double deployed;
};

class Improver {
  public:
    // No stride of a path may have an error above `bound`.
    Improver(const Trajectory& trajectory, double bound)
        : prefixes_(trajectory), end_(trajectory.steps()), bound_(bound),
          sample_(sample_of(trajectory)) {
        for (Index c = 0; c < trajectory.size(); ++c) columns_.push_back(trajectory.column(c, trajectory.size()));
    }

    double deployed(const Path& path) const { return span(path).error(); }

    // Up to `keep` paths, best first: `start` and what a beam of `width` prefixes finds, each after single-node moves.
    std::vector<Scored> improve(const Path& start, Index width, Index keep) {
        std::vector<Scored> found{{start, deployed(start)}};
        for (const Scored& other : beam(start, width))
            if (allowed(other.path)) found.push_back(other);
        for (Scored& scored : found) move_nodes(scored);
        rank(found);
        const auto same = [](const Scored& a, const Scored& b) { return a.path == b.path; };
        found.erase(std::unique(found.begin(), found.end(), same), found.end());
        if (static_cast<Index>(found.size()) > keep) found.resize(keep);
        return found;
    }

  private:
    static constexpr Index most_children = 32, most_rounds = 20, near = 16, most_prefixes = 1024;
    static constexpr double gain = 1e-9;  // a move that gains less is not worth its rounding error

    static void rank(std::vector<Scored>& paths) {
        std::sort(paths.begin(), paths.end(), [](const Scored& a, const Scored& b) {
            return a.deployed != b.deployed ? a.deployed < b.deployed : a.path < b.path;
        });
    }

    const Vector& output(Index node) const { return columns_[node + 1]; }

    Span span(const Path& path, std::size_t without = static_cast<std::size_t>(-1)) const {
        Span result(columns_[0], sample_);
        for (std::size_t k = 0; k < path.size(); ++k)
            if (k != without) result.add(output(path[k]));
        return result;
    }

    bool allowed(const Path& path) {
        if (prefixes_.count() > most_prefixes) prefixes_.clear();
        const Vector errors = stride_errors(prefixes_, path, end_);
        return *std::max_element(errors.begin(), errors.end()) <= bound_;
    }

    // Prefixes grow node by node. Each is scored with the rest of `start` behind it, stretched to fit.
    std::vector<Scored> beam(const Path& start, Index width) {
        std::vector<Scored> prefixes{{{0}, 0.0}};
        for (std::size_t k = 1; k < start.size() && width > 0; ++k) {
            std::vector<Scored> grown;
            for (const Scored& prefix : prefixes) grow(prefix.path, start, grown);
            rank(grown);
            if (static_cast<Index>(grown.size()) > width) grown.resize(width);
            prefixes = std::move(grown);
        }
        return prefixes;
    }

    void grow(const Path& path, const Path& start, std::vector<Scored>& grown) {
        if (prefixes_.count() > most_prefixes) prefixes_.clear();
        Index prefix = prefixes_.root();
        for (std::size_t k = 1; k < path.size(); ++k) prefix = prefixes_.child(prefix, path[k]);
        const Span before = span(path);
        const Index left = static_cast<Index>(start.size() - path.size()), first = path.back() + 1;
        Index last = end_ - left;
        while (last >= first && prefixes_.error(prefix, last) > bound_) --last;
        const Index step = (last - first) / most_children + 1;
        for (Index j = last; j >= first; j -= step) {
            if (prefixes_.error(prefix, j) > bound_) continue;
            Path longer = path;
            longer.push_back(j);
            Span whole = before;
            whole.add(output(j));
            for (const Index node : stretched(start, path.size(), j)) whole.add(output(node));
            grown.push_back({longer, whole.error()});
        }
    }

    // The nodes of `start` after its k-th, moved in proportion as the k-th goes to j.
    Path stretched(const Path& start, std::size_t k, Index j) const {
        Path rest;
        Index previous = j;
        for (std::size_t i = k + 1; i < start.size(); ++i) {
            const Index wanted = j + (start[i] - start[k]) * (end_ - j) / (end_ - start[k]);
            previous = std::min(std::max(wanted, previous + 1), end_ - static_cast<Index>(start.size() - i));
            rest.push_back(previous);
        }
        return rest;
    }

    // Moves one node at a time to its best place between its neighbours, until none gains.
    void move_nodes(Scored& scored) {
        bool moved = true;
        for (Index round = 0; moved && round < most_rounds; ++round) {
            moved = false;
            for (std::size_t k = 1; k < scored.path.size(); ++k) moved |= move_node(scored, k);
        }
    }

    bool move_node(Scored& scored, std::size_t k) {
        const Span others = span(scored.path, k);
        std::vector<Scored> moves;
        for (const Index j : places(scored.path, k)) {
            Path path = scored.path;
            path[k] = j;
            const double error = others.error_with(output(j));
            if (error < scored.deployed * (1 - gain)) moves.push_back({path, error});
        }
        rank(moves);
        for (const Scored& move : moves) {
            if (!allowed(move.path)) continue;
            const double error = deployed(move.path);
            if (error >= scored.deployed * (1 - gain)) continue;
            scored = {move.path, error};
            return true;
        }
        return false;
    }

    // Where node k can go: every place nearby, fewer farther off.
    Path places(const Path& path, std::size_t k) const {
        const Index before = path[k - 1], after = k + 1 < path.size() ? path[k + 1] : end_;
        Path found;
        for (Index away = 1; away < after - before; away += away < near ? 1 : away / 2) {
            if (path[k] - away > before) found.push_back(path[k] - away);
            if (path[k] + away < after) found.push_back(path[k] + away);
        }
        return found;
    }

    Prefixes prefixes_;
    Index end_;
    double bound_;
    Vector sample_;
    std::vector<Vector> columns_;
};

}  // namespace olss
