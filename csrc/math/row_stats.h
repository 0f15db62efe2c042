// The formulas of one row: the sums over its classes, how the sums of two pieces merge, and the statistics that follow from them.
//
// Student logits z, teacher logits y, temperature T, p = softmax(y/T), q = softmax(z/T), pi = softmax(z), psi = softmax(y).
// All sums are relative to the maxima m_z, m_y of their piece: dz = z - m_z <= 0, dy = y - m_y <= 0.  So nothing overflows, and
// logits keep all their digits at any offset:
//
//   KL(p||q)  = sum p (log p - log q),  log p = dy/T - log(sum e^(dy/T)),  log q = dz/T - log(sum e^(dz/T))
//             = cross / (T * teacher sum) + log(student sum / teacher sum)
//   H(pi)     = log(Z) - dot / Z,  Z = sum e^dz,  dot = sum e^dz dz
//   CE        = -sum t log pi = mass log(Z) - sum t dz,  mass = sum t
//
// The targets t are the label with smoothing s: t = (1 - s) y + s / C, where y are the label's probabilities, or 1 at a class index
// and 0 elsewhere.  A class with t = 0 adds 0 to the cross entropy, even if the student rules it out.
//
// Every sum of exponentials is stored as two numbers: how often the maximum occurs (it adds 1 each time), and the tail of all other
// classes.  If one class dominates, the others are far below the last digit of 1 and would be lost if added to it.  With the tail,
// log1p(tail) keeps the digits of the entropy of confident rows.
#pragma once
#include "math/portable.h"

namespace kcd {

// The sums over the classes of one network.
template <class Real>
struct ClassSums {
  Real max;      // -inf if no logit is finite
  Real ones;     // number of classes at the maximum
  Real tail;     // sum e^(dx/T) over the others
  Real tail_1;   // sum e^dx over the others
  Real dot_1;    // sum e^dx dx

  KCD_MEMBER Real sum() const { return ones + tail; }
  KCD_MEMBER Real sum_1() const { return ones + tail_1; }
};

template <class Real>
struct RowSums {
  ClassSums<Real> student, teacher;
  Real cross;   // sum e^(dy/T) (dy - dz), times Units::difference_scale
};

// The sums over the classes' targets.
template <class Real>
struct TargetSums {
  Real mass;   // sum t
  Real dot;    // sum t dz
};

// How a label becomes targets: t = of_label y + uniform.
template <class Real>
struct Smoothing {
  Real of_label, uniform;
};
template <class Real>
KCD_INLINE Smoothing<Real> smoothing_of(double label_smoothing, int64_t classes) {
  return {static_cast<Real>(1 - label_smoothing), static_cast<Real>(label_smoothing / static_cast<double>(classes))};
}

// The units of a row's sums.
template <class Real>
struct Units {
  Real inverse_temperature;
  // A student masked with the most negative finite number has differences near the end of the type's range.  Their sums over a
  // piece must not overflow if those over the row do not, so differences are scaled by a power of two.  1: the kernel recomputes
  // instead.
  Real difference_scale;
};
constexpr double kDifferenceScale = 1.0 / 18446744073709551616.0;   // 2^-64

// log2 of the bound below which float64 rounds to 0.  A class below it has no probability in any type and adds nothing, whether it
// was masked with -inf or with a large negative logit.
constexpr double kVanishing = -1075.0;

// The number subtracted from every logit of a piece: its maximum, or 0 if all logits are -inf, since -inf - -inf would be NaN.
template <class Real>
KCD_INLINE Real piece_reference(Real maximum) {
  return maximum == -Limits<Real>::infinity() ? Real(0) : maximum;
}

// The distance from a row's maximum to a piece's, <= 0.  0 for a piece without a finite logit.
template <class Real>
KCD_INLINE Real shift(Real piece_max, Real row_max) {
  return piece_max == -Limits<Real>::infinity() ? Real(0) : piece_max - row_max;
}

// Rebases sums on a greater maximum.  With dx' = dx + d: sum e^dx' dx' = e^d (sum e^dx dx + d sum e^dx), the others likewise.
template <class Real>
KCD_INLINE ClassSums<Real> rebase(const ClassSums<Real>& s, Real max, Real inverse_temperature) {
  const Real d = shift(s.max, max);
  if (d == 0) return {max, s.ones, s.tail, s.tail_1, s.dot_1};
  const Real scale_1 = exponential(d);
  return {max, Real(0), exponential(d * inverse_temperature) * s.sum(), scale_1 * s.sum_1(),
          scale_1 == 0 ? Real(0) : scale_1 * (s.dot_1 + d * s.sum_1())};
}

template <class Real>
KCD_INLINE RowSums<Real> rebase(const RowSums<Real>& s, Real student_max, Real teacher_max, const Units<Real>& units) {
  const Real inverse_temperature = units.inverse_temperature;
  const Real dz = shift(s.student.max, student_max), dy = shift(s.teacher.max, teacher_max);
  const Real scale = exponential(dy * inverse_temperature);
  Real cross;
  if (dy * inverse_temperature < static_cast<Real>(kVanishing * kLn2))
    cross = 0;
  else if (scale == 0)   // only in float32: finite sums vanish, an infinite divergence stays
    cross = s.cross - s.cross == 0 ? Real(0) : s.cross;
  else
    cross = scale * (s.cross + (dy - dz) * units.difference_scale * s.teacher.sum());
  return {rebase(s.student, student_max, inverse_temperature), rebase(s.teacher, teacher_max, inverse_temperature), cross};
}

template <class Real>
KCD_INLINE ClassSums<Real> add(const ClassSums<Real>& a, const ClassSums<Real>& b) {
  return {a.max, a.ones + b.ones, a.tail + b.tail, a.tail_1 + b.tail_1, a.dot_1 + b.dot_1};
}

// t dz, or 0 for a class without target.  NaN is never hidden.
template <class Real>
KCD_INLINE Real target_times(Real t, Real dz) {
  return t == 0 && dz == dz ? Real(0) : t * dz;
}

// Rebases sums on a maximum that is greater by -d: d = shift(old, new).
template <class Real>
KCD_INLINE TargetSums<Real> rebase(const TargetSums<Real>& s, Real d) {
  return {s.mass, s.dot + target_times(s.mass, d)};
}

template <class Real>
KCD_INLINE TargetSums<Real> add(const TargetSums<Real>& a, const TargetSums<Real>& b) {
  return {a.mass + b.mass, a.dot + b.dot};
}

// Merges the sums of two pieces of a row.
template <class Real>
KCD_INLINE RowSums<Real> merge(const RowSums<Real>& first, const RowSums<Real>& second, const Units<Real>& units) {
  const Real student_max = second.student.max > first.student.max ? second.student.max : first.student.max;
  const Real teacher_max = second.teacher.max > first.teacher.max ? second.teacher.max : first.teacher.max;
  const RowSums<Real> a = rebase(first, student_max, teacher_max, units);
  const RowSums<Real> b = rebase(second, student_max, teacher_max, units);
  return {add(a.student, b.student), add(a.teacher, b.teacher), a.cross + b.cross};
}

// log Z.  Uses log1p only if it matters, since it takes three times as long as log.
template <class Real>
KCD_INLINE Real log_sum_1(const ClassSums<Real>& s) {
  return s.ones == 1 && s.tail_1 < Real(0.5) ? log_of_1_plus(s.tail_1) : logarithm(s.sum_1());
}

template <class Real>
KCD_INLINE Real entropy(const ClassSums<Real>& s) {
  return log_sum_1(s) - s.dot_1 / s.sum_1();
}

template <class Real>
KCD_INLINE Real kl(const RowSums<Real>& s, const Units<Real>& units) {
  // One product and one sum: so the compiler fuses them in every kernel alike, whether it knows the units at compile time or not.
  const Real per_difference = units.inverse_temperature / units.difference_scale;
  return per_difference * (s.cross / s.teacher.sum()) + logarithm(s.student.sum() / s.teacher.sum());
}

template <class Real>
KCD_INLINE Real cross_entropy(const ClassSums<Real>& student, const TargetSums<Real>& targets) {
  return targets.mass * log_sum_1(student) - targets.dot;
}

// The targets' share of d CE / d z = mass pi - t, per e^dz.
template <class Real>
KCD_INLINE Real mass_per_sum_1(const ClassSums<Real>& student, const TargetSums<Real>& targets) {
  return targets.mass / student.sum_1();
}

}   // namespace kcd
