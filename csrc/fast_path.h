// The eager fast path: condensed_kd and condensed_kd_backward for small tensors on the CPU, without torch's dispatcher, which takes
// longer than such a call computes.  Tensors are read and made through DLPack's C functions.
#pragma once
#include <Python.h>

namespace kcd::fast_path {

// Adds both functions to a module; neither where this torch does not publish DLPack's functions.  -1: Python's error is set.
int add_to(PyObject* module);

}   // namespace kcd::fast_path
