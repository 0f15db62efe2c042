// The formulas of ranking and loss: a row's ranking value, the number of rows to keep, a row's share of the loss.
#pragma once
#include "math/portable.h"

namespace kcd {

// max(1, int(fraction * n)), or min(count, n) if count > 0.  0 if n is 0.
KCD_INLINE int64_t number_to_keep(double fraction, int64_t count, int64_t n) {
  if (n == 0) return 0;
  if (count > 0) return count < n ? count : n;
  const int64_t share = static_cast<int64_t>(fraction * static_cast<double>(n));
  return share > 1 ? share : 1;
}

// The ranking value of a row; NaN if it is not a candidate.  A candidate whose entropy or KL is NaN gets NaN too: it ranks first,
// whatever the ranking value, so that the NaN reaches the loss.
template <class Score, class Real>
KCD_INLINE Score ranking_value(bool candidate, Score value, Real entropy, Real kl) {
  return candidate && entropy == entropy && kl == kl ? value : Limits<Score>::nan();
}

// A weight of 0 removes a row, even with an infinite divergence.  A divergence of NaN is never hidden.
KCD_INLINE double weighted(double kl, double weight) { return weight == 0 && kl == kl ? 0.0 : kl * weight; }

struct LossFactors {
  double kd, ce;            // kd_weight T^2, ce_weight
  double selected, valid;   // divisors of the two sums; 0 if there are no rows: the term is then 0
};

KCD_INLINE double row_loss(double kd, double ce, const LossFactors& factors) { return factors.ce * ce + weighted(kd, factors.kd); }

// The loss from the sums over the selected and over the valid rows.
KCD_INLINE double total_loss(double kd_sum, double ce_sum, const LossFactors& factors) {
  const double ce = factors.valid > 0 ? weighted(ce_sum / factors.valid, factors.ce) : 0.0;
  return ce + (factors.selected > 0 ? weighted(kd_sum / factors.selected, factors.kd) : 0.0);
}

}   // namespace kcd
