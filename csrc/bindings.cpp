// The only file that sees pybind11: it binds, and computes nothing.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.doc() = "Path planning over an R factor, in plain C++."; }
