// Exponentials at temperatures T and 1, four classes at a time.  The suffix _1 means temperature 1.
#pragma once
#include "cuda/vectors.cuh"
#include "math/row_stats.h"
#include "math/temperature.h"

namespace kcd::cuda {

template <class Real>
struct Scale {
  Real per_logit;     // log2(e) / T: e^(x/T) = 2^(x * per_logit)
  Real per_logit_1;   // log2(e)
  Power power;
  Units<Real> units;
};

template <class Real>
Scale<Real> scale_of(double temperature) {
  return {static_cast<Real>(kLog2E / temperature),
          static_cast<Real>(kLog2E),
          power_for(temperature),
          {static_cast<Real>(1 / temperature), static_cast<Real>(kDifferenceScale)}};
}

// e^(dx/T)
template <class Real>
KCD_DEVICE void exponentials(const Real (&dx)[kQuad], const Scale<Real>& scale, Real (&e)[kQuad]) {
#pragma unroll
  for (int j = 0; j < kQuad; ++j) e[j] = exp2(dx[j] * scale.per_logit);
}

// e^dx, given e = e^(dx/T)
template <class Real>
KCD_DEVICE void exponentials_1(const Real (&dx)[kQuad], const Real (&e)[kQuad], const Scale<Real>& scale, Real (&e_1)[kQuad]) {
  if (scale.power == Power::four) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) e_1[j] = (e[j] * e[j]) * (e[j] * e[j]);
  } else if (scale.power == Power::two) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) e_1[j] = e[j] * e[j];
  } else if (scale.power == Power::one) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) e_1[j] = e[j];
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) e_1[j] = exp2(dx[j] * scale.per_logit_1);
  }
}

template <class Real>
KCD_DEVICE Real sum(const Real (&x)[kQuad]) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

}   // namespace kcd::cuda
