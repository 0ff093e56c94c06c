// The deployed error of a path. A stride starts from the teacher's state; in use a sampler has only the initial noise
// and the outputs at its own nodes:
//
//     deployed(path) = min over w of | [x_0, e_{s_1} .. e_{s_n}] w - x_T |
#pragma once

#include <utility>

#include "trajectory.h"

namespace olss {

// Orthonormal directions of chosen columns of R, and what they leave of the sample x_T.
class Span {
  public:
    Span(const Vector& noise, const Vector& sample) : residual_(sample) { add(noise); }

    // Collinear columns change nothing.
    void add(Vector v) {
        const double before = square(v), after = remove_directions(v);
        if (!(after > collinear * collinear * before)) return;
        for (double& x : v) x /= std::sqrt(after);
        remove_part(residual_.data(), v.data(), length(v));
        directions_.push_back(std::move(v));
    }

    double error() const { return std::sqrt(square(residual_)); }

    // What error() would be with one more column.
    double error_with(Vector v) const {
        const double before = square(v), after = remove_directions(v);
        const double along = after > collinear * collinear * before ? dot(v.data(), residual_.data(), length(v)) : 0.0;
        return std::sqrt(std::max(0.0, square(residual_) - (along == 0 ? 0.0 : along * along / after)));
    }

  private:
    static Index length(const Vector& v) { return static_cast<Index>(v.size()); }
    static double square(const Vector& v) { return dot(v.data(), v.data(), length(v)); }
    // Twice is enough. Returns the square of what is left.
    double remove_directions(Vector& v) const {
        for (int pass = 0; pass < 2; ++pass)
            for (const Vector& direction : directions_) remove_part(v.data(), direction.data(), length(v));
        return square(v);
    }

    std::vector<Vector> directions_;
    Vector residual_;
};

inline Vector sample_of(const Trajectory& trajectory) {
    const double* sample = trajectory.state(trajectory.steps());
    return Vector(sample, sample + padded(trajectory.size()));
}

inline double deployed_error(const Trajectory& trajectory, const Path& path) {
    Span span(trajectory.column(0, trajectory.size()), sample_of(trajectory));
    for (const Index node : path) span.add(trajectory.column(node + 1, trajectory.size()));
    return span.error();
}

}  // namespace olss
