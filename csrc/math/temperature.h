// How to get e^x from e^(x/T): by squaring if T is 1, 2 or 4, else with another exponential.
#pragma once
#include "math/portable.h"

namespace kcd {

enum class Power : int32_t { one, two, four, other };

KCD_INLINE Power power_for(double temperature) {
  return temperature == 1 ? Power::one : temperature == 2 ? Power::two : temperature == 4 ? Power::four : Power::other;
}

}   // namespace kcd
