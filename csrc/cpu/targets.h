// The targets of a row's cross entropy, if classes other than a class index have any (math/row_stats.h).
#pragma once
#include "cpu/convert.h"
#include "cpu/vector.h"
#include "kernels.h"
#include "math/row_stats.h"

namespace kcd {
namespace {

template <class Real>
struct TargetRow {
  bool exists = false;
  Smoothing<Real> smoothing{1, 0};
  Type type{};
  const char* labels = nullptr;   // the row's label probabilities; null: a class index
};

template <class Real>
KCD_INLINE TargetRow<Real> target_row(const Problem& problem, int64_t i) {
  if (!problem.with_targets()) return {};
  const Smoothing<Real> smoothing = smoothing_of<Real>(problem.label_smoothing, problem.classes);
  if (!problem.soft_labels) return {true, smoothing};
  return {true, smoothing, problem.label_probabilities.type, problem.label_probabilities.row(i)};
}

// Loads the first m elements.  If the compiler knows that m is kLanes, there is no branch.
template <class Real>
KCD_INLINE Vector<Real> load_lanes(const Real* p, int64_t m) {
  return m == kLanes<Real> ? load(p) : load(p, m, Real(0));
}

// The targets t = of_label y + uniform of classes [first, first + n), without that of a class index.
template <class Real>
class PieceTargets {
 public:
  PieceTargets(const TargetRow<Real>& row, int64_t first, int64_t n)
      : smoothing_(row.smoothing), y_(row.labels ? load_piece(row.type, row.labels, first, n, scratch_) : nullptr) {}

  KCD_MEMBER Vector<Real> probabilities(int64_t j, int64_t m) const { return y_ ? load_lanes(y_ + j, m) : Vector<Real>{}; }
  KCD_MEMBER Vector<Real> of(Vector<Real> y) const { return smoothing_.of_label * y + smoothing_.uniform; }
  KCD_MEMBER Vector<Real> lanes(int64_t j, int64_t m) const { return of(probabilities(j, m)); }

 private:
  Smoothing<Real> smoothing_;
  alignas(64) Real scratch_[kPiece];
  const Real* y_;
};

// Returns the sums over the targets of classes [first, first + n), whose logits z are in the cache.
template <class Real>
__attribute__((noinline)) TargetSums<Real> sum_targets(const TargetRow<Real>& row, int64_t first, int64_t n, const Real* z,
                                                       Real max) {
  const PieceTargets<Real> targets(row, first, n);
  const Real reference = piece_reference(max);
  Vector<Real> total{}, dot{};
  const auto add = [&](int64_t j, int64_t m, Vector<Real> z_lanes) KCD_LAMBDA {
    const Vector<Real> y = targets.probabilities(j, m), t = targets.of(y);
    total += y;
    dot = add_product_where(not_equal(t, Vector<Real>{}), dot, t, z_lanes - reference);
  };
  int64_t j = 0;
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) add(j, kLanes<Real>, load(z + j));
  if (j < n) add(j, n - j, load(z + j, n - j, reference));   // lanes past the end have dz = 0
  // Not the sum of all t: equal addends round alike, so that the errors of many would add up.
  return {row.smoothing.of_label * sum(total) + row.smoothing.uniform * static_cast<Real>(n), sum(dot)};
}

}   // namespace
}   // namespace kcd
