#pragma once

#include <pybind11/pybind11.h>

namespace fastres {

// Adds Plan, PackedWeights, Fingerprint and conv_kernels to the module.
void bind_plan(pybind11::module_& m);

}  // namespace fastres
