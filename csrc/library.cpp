// libkcd_ext.so: the same operators for torch.ops.load_library, without Python.  There a library can only register itself while it
// is loaded, and an exception would end the process: what goes wrong is kept for kcd_load_error().
#include <string>

#include "torch/ops.h"

namespace {
std::string& error() {
  static std::string text;
  return text;
}
const bool registered = [] {
  try {
    kcd::register_operators();
    return true;
  } catch (const std::exception& e) {
    error() = e.what();
    return false;
  }
}();
}   // namespace

extern "C" {
// Empty where loading went well.
__attribute__((visibility("default"))) const char* kcd_load_error() { return error().c_str(); }
// JSON, as kcd_ext._C.build_info().
__attribute__((visibility("default"))) const char* kcd_build_info() { return registered ? kcd::build_info_json().c_str() : "{}"; }
}
