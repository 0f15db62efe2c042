// kcd_ext._C: importing it registers the operators.  Registration happens in here, not in a static initialiser, so that a second
// copy of the extension ends in an ImportError and not in an abort.
#include <pybind11/pybind11.h>

#include "fast_path.h"
#include "kernels.h"
#include "torch/ops.h"

PYBIND11_MODULE(_C, module) {
  kcd::register_operators();
  module.def(
      "build_info", [] { return pybind11::module_::import("json").attr("loads")(kcd::build_info_json()); },
      "dict: version, compiler, instruction sets built and in use, CUDA architectures built.");
  // How kcd_ext/ops.py reads a state (kernels.h): the numbers of counts and of statistics, and the places of two of these.
  module.attr("STATE") = pybind11::make_tuple(kcd::kCounts, int{kcd::kStatsRows}, int{kcd::kEntropy}, int{kcd::kKl});
  kcd::fast_path::add_to(module);
}
