#pragma once

#include <pybind11/pybind11.h>

namespace fastres {

// Adds machine_limits to the module.
void bind_limits(pybind11::module_& m);

}  // namespace fastres
