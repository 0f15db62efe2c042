// Which instruction set runs: the best this processor has, or the one the environment variable KCD_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/sets.h"

namespace kcd::cpu {
namespace {

struct Candidate {
  Kernels kernels;
  bool supported;
};

const Candidate* candidates() {   // best first, a null name at the end
#define X(set, name, supported) \
  {{name, set::forward, set::backward, &set::split_row, set::write_pieces}, static_cast<bool>(supported)},
  static const Candidate all[] = {KCD_SETS(X){{}, false}};
#undef X
  return all;
}

const Kernels& choose() {
  const char* wanted = std::getenv("KCD_ISA");
  std::string usable;
  for (const Candidate* c = candidates(); c->kernels.name; ++c) {
    if (!c->supported) continue;
    if (!wanted || !*wanted || !std::strcmp(wanted, c->kernels.name)) return c->kernels;
    usable += (usable.empty() ? "" : ", ") + std::string(c->kernels.name);
  }
  throw std::invalid_argument("KCD_ISA must be one of " + usable + " on this processor (or unset), got '" + wanted + "'");
}

}   // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* const* built_sets() {
#define X(set, name, supported) name,
  static const char* const names[] = {KCD_SETS(X) nullptr};
#undef X
  return names;
}

}   // namespace kcd::cpu
