// Integer keys in the order of the ranking: a greater value has a greater key.
#pragma once
#include "math/portable.h"

namespace kcd {

// Read as an unsigned integer, a float's bits increase with positive floats and decrease with negative ones.  Setting the sign bit
// of positive floats and inverting negative ones gives one increasing scale.  -0 equals +0; NaN of either sign has the greatest
// key.  No value has key 0, which stands for a row that is not a candidate.
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
