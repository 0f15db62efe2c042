// Integer keys that order as the ranking does: greater value, greater key.
#pragma once
#include "math/portable.h"

namespace kcd {

// A float's bits, read as an unsigned number, grow with positive floats and shrink with negative ones: setting the sign bit of the
// former and inverting the latter makes one increasing scale.  -0 is +0; NaN of either sign is the one greatest key.
// No value has key 0: it stands for a row that is no candidate.
KCD_INLINE uint32_t order_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = bit_cast<uint32_t>(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

KCD_INLINE uint64_t order_key(double x) {
  if (x != x) return ~uint64_t{0};
  const uint64_t bits = bit_cast<uint64_t>(x == 0.0 ? 0.0 : x);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

}   // namespace kcd
