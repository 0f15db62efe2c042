// From temperature T to temperature 1 without a second exponential, where T allows it.
#pragma once
#include <type_traits>

#include "cpu/vector.h"

namespace kcd {
namespace {

// How e^x follows from e^(x/T): the T-th power by squaring where T is 1, 2 or 4, else another exponential.
enum class Power { one, two, four, other };

// run(a constant whose value is the Power for this temperature)
template <class Run>
KCD_INLINE void with_power(double temperature, const Run& run) {
  if (temperature == 1) return run(std::integral_constant<Power, Power::one>{});
  if (temperature == 2) return run(std::integral_constant<Power, Power::two>{});
  if (temperature == 4) return run(std::integral_constant<Power, Power::four>{});
  run(std::integral_constant<Power, Power::other>{});
}

template <class Real>
struct Scale {
  Real inverse_temperature;
  Vector<Real> per_logit;     // log2(e) / T: e^(x/T) = 2^(x * per_logit)
  Vector<Real> per_logit_1;   // log2(e)
  explicit Scale(double temperature)
      : inverse_temperature(static_cast<Real>(1 / temperature)),
        per_logit(broadcast(static_cast<Real>(kLog2E / temperature))),
        per_logit_1(broadcast(static_cast<Real>(kLog2E))) {}
};

// e^x, given e = e^(x/T).  What would end below the smallest normal number is 0 before it is squared: arithmetic on subnormal
// numbers is many times slower.
template <Power power, class Real>
KCD_INLINE Vector<Real> at_temperature_1(Vector<Real> e, Vector<Real> x, const Scale<Real>& scale) {
  if (power == Power::one) return e;
  if (power == Power::other) return exp2(x * scale.per_logit_1);
  const Real least = power == Power::two ? Limits<Real>::root_of_smallest() : Limits<Real>::fourth_root_of_smallest();
  const Vector<Real> square = e < least ? Vector<Real>{} : e * e;
  return power == Power::two ? square : square * square;
}

}   // namespace
}   // namespace kcd
