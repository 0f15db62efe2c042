// The eager path's own door to the operators on the CPU, for calls so small that the way to them takes longer than they do: no
// dispatcher, no tensors but loss and gradient, tensors seen and made through DLPack's C functions.
#pragma once
#include <Python.h>

namespace kcd::small {

// Adds small_forward, small_loss, small_attach and small_backward to a module, each with its own docstring; nothing
// where this torch does not publish what they need.  -1: Python's error is set.
int add_to(PyObject* module);

}   // namespace kcd::small
