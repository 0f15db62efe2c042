// The formulas of one row: sums over its classes, how sums of two pieces merge, and what they say in the end.
//
// Student logits z, teacher logits y, temperature T, p = softmax(y/T), q = softmax(z/T), pi = softmax(z), psi = softmax(y).
// Every sum is taken relative to the maxima m_z, m_y of its piece, dz = z - m_z <= 0, dy = y - m_y <= 0, so that nothing overflows
// and logits of any offset keep all their digits:
//
//   KL(p||q)  = sum p (log p - log q),  log p = dy/T - log(sum e^(dy/T)),  log q = dz/T - log(sum e^(dz/T))
//             = cross / (T * teacher_sum) + log(student_sum / teacher_sum)
//   H(pi)     = log(student_sum_1) - student_dot_1 / student_sum_1
#pragma once
#include "math/portable.h"

namespace kcd {

template <class Real>
struct RowSums {
  Real student_max, teacher_max;   // -inf over a piece without any finite logit
  Real student_sum;                // sum e^(dz/T)
  Real student_sum_1;              // sum e^dz
  Real student_dot_1;              // sum e^dz dz
  Real teacher_sum;                // sum e^(dy/T)
  Real cross;                      // sum e^(dy/T) (dy - dz)
  Real teacher_sum_1;              // sum e^dy
  Real teacher_dot_1;              // sum e^dy dy
};

// The number subtracted from every logit of a piece: its maximum, or 0 where all its logits are -inf (e^-inf is 0 either way, while
// -inf - -inf would not be).
template <class Real>
KCD_INLINE Real reference(Real maximum) {
  return maximum == -Limits<Real>::infinity() ? Real(0) : maximum;
}

// By how much a piece's relative logits fall when it moves to the maximum of the whole; 0 for a piece that has none.
template <class Real>
KCD_INLINE Real shift(Real own, Real whole) {
  return own == -Limits<Real>::infinity() ? Real(0) : own - whole;
}

// Moves sums to greater maxima: with dz' = dz + d, sum e^dz' dz' = e^d (sum e^dz dz + d sum e^dz), and likewise for the others.
template <class Real>
KCD_INLINE RowSums<Real> rebase(RowSums<Real> s, Real student_max, Real teacher_max, Real inverse_temperature) {
  const Real dz = shift(s.student_max, student_max), dy = shift(s.teacher_max, teacher_max);
  if (dz != 0) {
    const Real at_1 = exponential(dz);
    s.student_sum *= exponential(dz * inverse_temperature);
    s.student_dot_1 = at_1 == 0 ? Real(0) : at_1 * (s.student_dot_1 + dz * s.student_sum_1);
    s.student_sum_1 *= at_1;
  }
  if (dy != 0 || dz != 0) {
    const Real at_t = exponential(dy * inverse_temperature), at_1 = exponential(dy);
    // A piece without mass in the whole adds nothing, but an infinite divergence stays infinite.
    s.cross = at_t == 0 ? s.cross * Limits<Real>::smallest() : at_t * (s.cross + (dy - dz) * s.teacher_sum);
    s.teacher_sum *= at_t;
    s.teacher_dot_1 = at_1 == 0 ? Real(0) : at_1 * (s.teacher_dot_1 + dy * s.teacher_sum_1);
    s.teacher_sum_1 *= at_1;
  }
  s.student_max = student_max;
  s.teacher_max = teacher_max;
  return s;
}

template <class Real>
KCD_INLINE RowSums<Real> merge(const RowSums<Real>& first, const RowSums<Real>& second, Real inverse_temperature) {
  const Real student_max = second.student_max > first.student_max ? second.student_max : first.student_max;
  const Real teacher_max = second.teacher_max > first.teacher_max ? second.teacher_max : first.teacher_max;
  RowSums<Real> a = rebase(first, student_max, teacher_max, inverse_temperature);
  const RowSums<Real> b = rebase(second, student_max, teacher_max, inverse_temperature);
  a.student_sum += b.student_sum;
  a.student_sum_1 += b.student_sum_1;
  a.student_dot_1 += b.student_dot_1;
  a.teacher_sum += b.teacher_sum;
  a.cross += b.cross;
  a.teacher_sum_1 += b.teacher_sum_1;
  a.teacher_dot_1 += b.teacher_dot_1;
  return a;
}

template <class Real>
KCD_INLINE Real entropy(Real sum_1, Real dot_1) {
  return logarithm(sum_1) - dot_1 / sum_1;
}

template <class Real>
KCD_INLINE Real kl(const RowSums<Real>& s, Real inverse_temperature) {
  return inverse_temperature * (s.cross / s.teacher_sum) + logarithm(s.student_sum / s.teacher_sum);
}

// -log pi[label]
template <class Real>
KCD_INLINE Real cross_entropy(const RowSums<Real>& s, Real label_logit) {
  return logarithm(s.student_sum_1) - (label_logit - reference(s.student_max));
}

}   // namespace kcd
