// The only file that sees pybind11: it binds, and computes nothing. Arguments are checked by the
// modules that call it: olss_fast/tuning/path_planning.py, olss_fast/executors/host_step.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>

#include "improve.h"
#include "runtime/run/step.h"

namespace py = pybind11;

namespace {

using Matrix = py::array_t<double, py::array::c_style>;
using Unlocked = py::call_guard<py::gil_scoped_release>;
using Measured = std::tuple<olss::Path, olss::Vector, double>;

olss::Trajectory trajectory(const Matrix& r, const Matrix& rows) {
    return olss::Trajectory(r.data(), rows.data(), r.shape(0) - 1);
}

Measured measured(const olss::Trajectory& run, const olss::Path& path) {
    olss::Prefixes prefixes(run);
    return {path, olss::stride_errors(prefixes, path, run.steps()), olss::deployed_error(run, path)};
}

Measured measure(const Matrix& r, const Matrix& rows, const olss::Path& path) {
    return measured(trajectory(r, rows), path);
}

std::tuple<Measured, double, bool> plan(const Matrix& r, const Matrix& rows, olss::Index steps,
                                        olss::Index most_visits) {
    const olss::Trajectory run = trajectory(r, rows);
    const olss::PlannedPath plan = olss::plan_path(run, steps, most_visits);
    return {measured(run, plan.path), plan.threshold, plan.proven};
}

std::vector<Measured> improve(const Matrix& r, const Matrix& rows, const olss::Path& path, double bound,
                              olss::Index width, olss::Index keep) {
    const olss::Trajectory run = trajectory(r, rows);
    std::vector<Measured> paths;
    for (const olss::Scored& found : olss::Improver(run, bound).improve(path, width, keep))
        paths.push_back(measured(run, found.path));
    return paths;
}

// The memory of a StepState (kernels/step.py), by address.
template <typename T>
struct HostStep {
    std::uintptr_t history, rows, timesteps, guidance, finished, noise_counts, noise_start, anchored, x, time;
    std::ptrdiff_t stride, size, height, width, times;
    std::int32_t programs;
    int branches;
    bool doubled;

    template <typename V>
    static V* at(std::uintptr_t address) {
        return reinterpret_cast<V*>(address);
    }

    // The step with `output`, or `start` where it is 0; false where there is no such row.
    bool operator()(std::uintptr_t output) const {
        auto* counter = at<std::int32_t>(finished);
        const std::ptrdiff_t row = output ? *counter / programs + 1 : 0;
        if (row < 0 || row >= height) return false;
        const bool from_x = output && *at<std::int32_t>(anchored);
        const olss::StepColumns<T> columns{at<T>(history), at<const T>(from_x ? x : history), stride, size,
                                           1 + row * branches, *at<std::int32_t>(noise_start),
                                           at<std::int32_t>(noise_counts)[row], branches, doubled};
        olss::host_step(columns, at<const T>(output), *at<const T>(guidance), at<const T>(rows) + row * width, at<T>(x));
        std::fill_n(at<float>(time), times, at<const float>(timesteps)[row]);
        *counter = output ? *counter + programs : 0;
        return true;
    }
};

template <typename T>
void bind_step(py::module_& m, const char* name) {
    using Step = HostStep<T>;
    py::class_<Step>(m, name, "One step of a plan on the host; use olss_fast.executors.host_step, which checks.")
        .def(py::init([](const std::array<std::uintptr_t, 10>& a, const std::array<std::ptrdiff_t, 5>& s,
                         std::int32_t programs, int branches, bool doubled) {
                 return Step{a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9],
                             s[0], s[1], s[2], s[3], s[4], programs, branches, doubled};
             }),
             py::arg("addresses"), py::arg("sizes"), py::arg("programs"), py::arg("branches"), py::arg("doubled"))
        .def("__call__", &Step::operator(), py::arg("output"), Unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Path planning over an R factor (olss_fast.tuning.path_planning) and steps on the host (olss_fast.executors).";
    m.def("measure", &measure, py::arg("r"), py::arg("rows"), py::arg("path"), Unlocked(),
          "A path with its stride errors and its deployed error, not divided by the root of the number of values.");
    m.def("plan", &plan, py::arg("r"), py::arg("rows"), py::arg("steps"), py::arg("most_visits"), Unlocked(),
          "The planned path as `measure` gives it, the least feasible threshold, and whether that is proven.");
    m.def("improve", &improve, py::arg("r"), py::arg("rows"), py::arg("path"), py::arg("bound"), py::arg("width"),
          py::arg("keep"), Unlocked(),
          "Paths near `path` as `measure` gives them, least deployed error first, no stride error above `bound`.");
    bind_step<float>(m, "HostStep32");
    bind_step<double>(m, "HostStep64");
}
