// The targets of a row's cross entropy, if classes other than a class index have any (math/row_stats.h).
#pragma once
#include "cuda/vectors.cuh"
#include "math/row_stats.h"

namespace kcd::cuda {

// The sums of a row with targets; RowSums<Real> are those of a row without.
template <class Real>
struct RowSumsWithTargets : RowSums<Real> {
  TargetSums<Real> targets;   // without that of a class index
};

template <class Sums>
constexpr bool kHasTargets = false;
template <class Real>
constexpr bool kHasTargets<RowSumsWithTargets<Real>> = true;

template <class Real>
KCD_DEVICE RowSumsWithTargets<Real> rebase(const RowSumsWithTargets<Real>& s, Real student_max, Real teacher_max,
                                           const Units<Real>& units) {
  return {kcd::rebase(static_cast<const RowSums<Real>&>(s), student_max, teacher_max, units),
          kcd::rebase(s.targets, shift(s.student.max, student_max))};
}

// Sets t to the targets of classes c to c + 3 of row i, without that of a class index.  The first n classes exist; the others get
// 0.
template <class Real>
KCD_DEVICE void load_targets(const Problem& p, int64_t i, int c, int n, Real (&t)[kQuad]) {
  const Smoothing<Real> smoothing = smoothing_of<Real>(p.label_smoothing, p.classes);
  const Row labels = p.soft_labels ? row_of(p.label_probabilities, i) : Row{};
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    t[j] = 0;
    if (j >= n) continue;
    t[j] = smoothing.uniform;
    if (p.soft_labels) t[j] += smoothing.of_label * load_logit<Real>(labels.at(c + j), labels.type);
  }
}

}   // namespace kcd::cuda
