#pragma once
#include <string>

namespace kcd {

// Registers the operators torch.ops.kcd_ext.*; throws where another copy of this library has done so in this process.
void register_operators();

// Version, compilers, instruction sets built and in use, CUDA architectures built; as JSON.
const std::string& build_info_json();

}   // namespace kcd
