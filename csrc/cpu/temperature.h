// From temperature T to temperature 1 without a second exponential, where T allows it.
#pragma once
#include "cpu/vector.h"
#include "math/row_stats.h"
#include "math/temperature.h"

namespace kcd {
namespace {

template <class Real>
struct Scale {
  // In float32 the scaled differences of ordinary rows would be subnormal numbers, on which a CPU is many times slower; its kernels
  // sum a row that leaves the range again in float64.
  Units<Real> units;
  Vector<Real> per_logit;     // log2(e) / T: e^(x/T) = 2^(x * per_logit)
  Vector<Real> per_logit_1;   // log2(e)
  explicit Scale(double temperature)
      : units{static_cast<Real>(1 / temperature), static_cast<Real>(sizeof(Real) == sizeof(double) ? kDifferenceScale : 1.0)},
        per_logit(broadcast(static_cast<Real>(kLog2E / temperature))),
        per_logit_1(broadcast(static_cast<Real>(kLog2E))) {}
};

// Where e^x, given e = e^(x/T), is more than 0, or not a number.  What would end below the smallest normal number is 0 before it is
// squared: arithmetic on subnormal numbers is many times slower.
template <class Real>
KCD_INLINE Mask<Real> counts_at_temperature_1(Power power, Vector<Real> e, Vector<Real> x) {
  if (power == Power::two) return not_less(e, broadcast(Limits<Real>::root_of_smallest()));
  if (power == Power::four) return not_less(e, broadcast(Limits<Real>::fourth_root_of_smallest()));
  return not_less(x, broadcast(-Limits<Real>::largest()));
}

// e^x there, and 0 elsewhere.
template <class Real>
KCD_INLINE Vector<Real> at_temperature_1(Power power, Mask<Real> counts, Vector<Real> e, Vector<Real> x, const Scale<Real>& scale) {
  if (power == Power::one) return e;
  if (power == Power::other) return exp2(x * scale.per_logit_1);
  const Vector<Real> square = where(counts, e * e);
  return power == Power::two ? square : square * square;
}

}   // namespace
}   // namespace kcd
