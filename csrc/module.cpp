// kcd_ext._C: importing it registers the operators.  Registering here instead of in a static initialiser makes a second copy of the
// extension raise ImportError instead of aborting the process.
#include <pybind11/pybind11.h>

#include "fast_path.h"
#include "kernels.h"
#include "torch/ops.h"

PYBIND11_MODULE(_C, module) {
  kcd::register_operators();
  module.def(
      "build_info", [] { return pybind11::module_::import("json").attr("loads")(kcd::build_info_json()); },
      "Return a dict: version, compiler, instruction sets built and in use, CUDA architectures built.");
  // The layout of a state (kernels.h) for kcd_ext/ops.py: how many counts and statistics, and the indices of two statistics.
  module.attr("STATE") = pybind11::make_tuple(kcd::kCounts, int{kcd::kStatsRows}, int{kcd::kEntropy}, int{kcd::kKl});
  kcd::fast_path::add_to(module);
}
