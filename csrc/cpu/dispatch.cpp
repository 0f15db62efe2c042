// Chooses the instruction set: the best one this processor supports, or the one in the environment variable KCD_ISA.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/instruction_sets.h"

namespace kcd::cpu {
namespace {

struct InstructionSet {
  Kernels kernels;
  bool supported;
};

const InstructionSet* instruction_sets() {   // best first, a null name at the end
#define X(set, name, supported) \
  {{name, set::row_stats, set::condensed_kd_backward, &set::split_row, set::write_gradient_pieces}, static_cast<bool>(supported)},
  static const InstructionSet all[] = {KCD_INSTRUCTION_SETS(X){{}, false}};
#undef X
  return all;
}

const Kernels& choose_kernels() {
  const char* requested = std::getenv("KCD_ISA");
  std::string supported;
  for (const InstructionSet* set = instruction_sets(); set->kernels.name; ++set) {
    if (!set->supported) continue;
    if (!requested || !*requested || !std::strcmp(requested, set->kernels.name)) return set->kernels;
    supported += (supported.empty() ? "" : ", ") + std::string(set->kernels.name);
  }
  throw std::invalid_argument("KCD_ISA must be one of " + supported + " on this processor (or unset), got '" + requested + "'");
}

}   // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

const char* const* built_instruction_sets() {
#define X(set, name, supported) name,
  static const char* const names[] = {KCD_INSTRUCTION_SETS(X) nullptr};
#undef X
  return names;
}

}   // namespace kcd::cpu
