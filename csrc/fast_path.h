// The eager fast path: the operators for small CPU tensors without torch's dispatcher, which takes longer than such a call
// computes.  DLPack's C functions read and create the tensors.
#pragma once
#include <pybind11/pybind11.h>

namespace kcd::fast_path {
// Adds three functions to the module: condensed_kd and condensed_kd_backward, which do what the operators do, and knowledge, which
// copies a state's arrays.  They return NotImplemented for calls that they do not support.  Adds nothing if this torch does not
// publish DLPack's functions.
void add_to(pybind11::module_& module);
}   // namespace kcd::fast_path
