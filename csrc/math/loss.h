// From rows to the loss: what a row is ranked by, how many are kept, what a row adds.
#pragma once
#include "math/portable.h"

namespace kcd {

// max(1, int(fraction * n)), or min(count, n) where count > 0; 0 of none.
KCD_INLINE int64_t number_to_keep(double fraction, int64_t count, int64_t n) {
  if (n == 0) return 0;
  if (count > 0) return count < n ? count : n;
  const int64_t share = static_cast<int64_t>(fraction * static_cast<double>(n));
  return share > 1 ? share : 1;
}

// What a row is ranked by; NaN where it is no candidate.  A candidate whose entropy or KL is not a number ranks first, whatever is
// asked for, so that it reaches the loss.
template <class Score, class Real>
KCD_INLINE Score ranked(bool candidate, Score value, Real entropy, Real kl) {
  return candidate && entropy == entropy && kl == kl ? value : Limits<Score>::nan();
}

// A weight of 0 takes a row out, whatever its divergence, unless that is not a number: NaN is never hidden.
KCD_INLINE double weighted(double kl, double weight) { return weight == 0 && kl == kl ? 0.0 : kl * weight; }

struct LossFactors {
  double kd, ce;            // kd_weight T^2, ce_weight
  double selected, valid;   // what the two sums are divided by; 0 for no rows, whose sum then counts 0
};

KCD_INLINE double loss_of_row(double kd, double ce, const LossFactors& factors) {
  return factors.ce * ce + weighted(kd, factors.kd);
}

// From the sums over the selected and over the valid rows.
KCD_INLINE double loss_of_sums(double kd_sum, double ce_sum, const LossFactors& factors) {
  const double ce = factors.valid > 0 ? weighted(ce_sum / factors.valid, factors.ce) : 0.0;
  return ce + (factors.selected > 0 ? weighted(kd_sum / factors.selected, factors.kd) : 0.0);
}

}   // namespace kcd
