// The only file that sees pybind11: it binds, and computes nothing. Arguments are checked in olss_fast/planning.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "improve.h"

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
    const olss::Plan plan = olss::plan_path(run, steps, most_visits);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Path planning over an R factor, in plain C++. Use olss_fast.planning, which checks what it is given.";
    m.def("measure", &measure, py::arg("r"), py::arg("rows"), py::arg("path"), Unlocked(),
          "A path with its stride errors and its deployed error, not divided by the root of the number of values.");
    m.def("plan", &plan, py::arg("r"), py::arg("rows"), py::arg("steps"), py::arg("most_visits"), Unlocked(),
          "The planned path as `measure` gives it, the least feasible threshold, and whether that is proven.");
    m.def("improve", &improve, py::arg("r"), py::arg("rows"), py::arg("path"), py::arg("bound"), py::arg("width"),
          py::arg("keep"), Unlocked(),
          "Paths near `path` as `measure` gives them, least deployed error first, no stride error above `bound`.");
}
