// Conversions of float16 and bfloat16 to and from float32, with arithmetic that every processor supports.
#pragma once
#include "math/portable.h"

namespace kcd {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

KCD_INLINE float to_float(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Shifts exponent and mantissa to their positions in a float32.  The factor 2^112 corrects the bias, for subnormal numbers too.
KCD_INLINE float to_float(float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;   // infinity or NaN
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

// Rounds to nearest, ties to even; NaN stays NaN.
KCD_INLINE bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

KCD_INLINE float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14, adding 1/2 aligns the mantissa to 2^-24, the smallest step of float16, and rounds.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;   // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(sign | half)};
}

}   // namespace kcd
