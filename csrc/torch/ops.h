#pragma once
#include <string>

namespace kcd {

// Registers the operators torch.ops.kcd_ext.*.  Throws if another copy of this library has registered them in this process.
void register_operators();

// Version, compilers, instruction sets built and in use, and CUDA architectures built, as JSON.
const std::string& build_info_json();

}   // namespace kcd
