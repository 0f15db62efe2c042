// From rows to the loss: what rows are ranked by, how many are selected, the sums.  O(rows), in a fixed order.
#pragma once
#include "kernels.h"

namespace kcd::cpu {

// What rows are ranked by; `score`: numbers the caller brings.
enum class Value : int64_t { entropy, teacher_entropy, kl, cross_entropy, score };

enum class Reduction : int64_t { mean, sum, none };

// candidate[i]: row i is valid and the teacher holds it (where there is a teacher).  Returns how many are.
int64_t mark_candidates(const Problem& problem, uint8_t* candidate);

int64_t count_valid(const Problem& problem);

// ranked[i] = value[i] in candidates whose entropy and KL are numbers, else NaN: such a row ranks first, whatever is asked for, so
// that it reaches the loss.  `with_kl`: there is a teacher.
template <class Score, class Real>
void rank(const Score* value, const Real* entropy, const Real* kl, bool with_kl, const uint8_t* candidate, int64_t rows,
          Score* ranked) {
  for (int64_t i = 0; i < rows; ++i) {
    const bool number = candidate[i] && entropy[i] == entropy[i] && !(with_kl && kl[i] != kl[i]);
    ranked[i] = number ? value[i] : static_cast<Score>(__builtin_nan(""));
  }
}

// A weight of 0 takes a row out, whatever its divergence, unless that is not a number: NaN is never hidden.
inline double weighted(double kl, double weight) { return weight == 0 && kl == kl ? 0.0 : kl * weight; }

struct LossFactors {
  double kd, ce;            // kd_weight T^2, ce_weight
  double selected, valid;   // what the two sums are divided by
  Reduction reduction;
};

// loss: one number, or one a row for Reduction::none.  Sums run over the rows in order, in double.
template <class Real>
void loss(const Problem& problem, const Real* kl, const Real* cross_entropy, const Real* row_weight, const uint8_t* selected,
          const LossFactors& factors, Real* loss) {
  double kd_sum = 0, ce_sum = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    const double kd =
        selected[i] ? weighted(static_cast<double>(kl[i]), row_weight ? static_cast<double>(row_weight[i]) : 1.0) : 0.0;
    const double ce = factors.ce != 0 && problem.valid(i) ? static_cast<double>(cross_entropy[i]) : 0.0;
    if (factors.reduction == Reduction::none) loss[i] = static_cast<Real>(factors.ce * ce + weighted(kd, factors.kd));
    kd_sum += kd;
    ce_sum += ce;
  }
  if (factors.reduction == Reduction::none) return;
  const auto share = [](double factor, double sum, double n) { return n > 0 ? weighted(sum / n, factor) : 0.0; };
  *loss = static_cast<Real>(share(factors.ce, ce_sum, factors.valid) + share(factors.kd, kd_sum, factors.selected));
}

}   // namespace kcd::cpu
