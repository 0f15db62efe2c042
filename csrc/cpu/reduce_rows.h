// From rows to the loss: candidates, ranking values, sums.  O(rows), in a fixed order.
#pragma once
#include "kernels.h"
#include "math/loss.h"

namespace kcd::cpu {

// Sets candidate[i] if row i is valid and, in a call with a teacher, has a teacher row.  Returns the number of candidates.
int64_t mark_candidates(const Problem& problem, uint8_t* candidate);

int64_t count_valid(const Problem& problem);

template <class Score, class Real>
void rank_rows(const Score* value, const Real* entropy, const Real* kl, const uint8_t* candidate, int64_t rows, Score* ranking) {
  for (int64_t i = 0; i < rows; ++i) ranking[i] = ranking_value(candidate[i] != 0, value[i], entropy[i], kl[i]);
}

// loss: one number, or one for each row with Reduction::none.  Sums the rows in order, in double.
template <class Real>
void reduce_rows(const Problem& problem, const Real* kl, const Real* cross_entropy, const Real* row_weight, const uint8_t* selected,
                 const LossFactors& factors, Reduction reduction, Real* loss) {
  double kd_sum = 0, ce_sum = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    const double kd =
        selected[i] ? weighted(static_cast<double>(kl[i]), row_weight ? static_cast<double>(row_weight[i]) : 1.0) : 0.0;
    const double ce = factors.ce != 0 && problem.valid(i) ? static_cast<double>(cross_entropy[i]) : 0.0;
    if (reduction == Reduction::none) loss[i] = static_cast<Real>(row_loss(kd, ce, factors));
    kd_sum += kd;
    ce_sum += ce;
  }
  if (reduction != Reduction::none) *loss = static_cast<Real>(total_loss(kd_sum, ce_sum, factors));
}

}   // namespace kcd::cpu
