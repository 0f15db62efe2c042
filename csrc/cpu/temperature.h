// e^x from e^(x/T), without a second exponential if T allows it.
#pragma once
#include "cpu/vector.h"
#include "math/row_stats.h"
#include "math/temperature.h"

namespace kcd {
namespace {

template <class Real>
struct Scale {
  // Only float64 scales its differences.  In float32 the scaled differences of ordinary rows would be subnormal numbers, on which a
  // CPU is many times slower; rows that overflow float32 are recomputed in float64 instead.
  Units<Real> units;
  Vector<Real> per_logit;     // log2(e) / T: e^(x/T) = 2^(x * per_logit)
  Vector<Real> per_logit_1;   // log2(e)
  explicit Scale(double temperature)
      : units{static_cast<Real>(1 / temperature), static_cast<Real>(sizeof(Real) == sizeof(double) ? kDifferenceScale : 1.0)},
        per_logit(broadcast(static_cast<Real>(kLog2E / temperature))),
        per_logit_1(broadcast(static_cast<Real>(kLog2E))) {}
};

// Lanes where e^x is positive or NaN, given e = e^(x/T).  Results below the smallest normal number are flushed to 0 before
// squaring, because arithmetic on subnormal numbers is many times slower.
template <class Real>
KCD_INLINE Mask<Real> is_nonzero_at_temperature_1(Power power, Vector<Real> e, Vector<Real> x) {
  if (power == Power::two) return not_less(e, broadcast(Limits<Real>::root_of_smallest()));
  if (power == Power::four) return not_less(e, broadcast(Limits<Real>::fourth_root_of_smallest()));
  return not_less(x, broadcast(-Limits<Real>::largest()));
}

// e^x in the lanes of `nonzero`, 0 in the others.
template <class Real>
KCD_INLINE Vector<Real> exp_at_temperature_1(Power power, Mask<Real> nonzero, Vector<Real> e, Vector<Real> x,
                                             const Scale<Real>& scale) {
  if (power == Power::one) return e;
  if (power == Power::other) return exp2(x * scale.per_logit_1);
  const Vector<Real> square = where(nonzero, e * e);
  return power == Power::two ? square : square * square;
}

}   // namespace
}   // namespace kcd
