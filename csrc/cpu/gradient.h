// The formula of the gradient for a piece of a row, out of exponentials that are computed, or that the forward pass has at hand.
//
// Exponentials are relative to the maxima of the piece, as in the forward pass, and every factor of the row is lowered by what the
// piece's maximum lies below the row's: both ways give the same bits.
#pragma once
#include "cpu/temperature.h"
#include "cpu/vector.h"
#include "math/row_stats.h"

namespace kcd {
namespace {

// d = student e^((z - m_z)/T) - teacher e^((y - m_y)/T) + ce e^(z - m_z): the factors of the loss over the sums of the row, or
// piece.
template <class Real>
struct Factors {
  Real student_max, teacher_max;
  Real student;   // kd / sum e^((z - m_z)/T)
  Real teacher;   // kd / sum e^((y - m_y)/T)
  Real ce;        // ce / sum e^(z - m_z)

  KCD_MEMBER Factors of_piece(Real piece_student_max, Real piece_teacher_max, Real inverse_temperature) const {
    const Real fall = shift(piece_student_max, student_max), teacher_fall = shift(piece_teacher_max, teacher_max);
    return {reference(piece_student_max), reference(piece_teacher_max), student * exponential(fall * inverse_temperature),
            teacher * exponential(teacher_fall * inverse_temperature), ce * exponential(fall)};
  }
};

// One vector of classes; dz = z - m_z counts where a second exponential is needed.
template <Power power, bool with_kd, bool with_ce, class Real>
KCD_INLINE Vector<Real> gradient_of(Vector<Real> e, Vector<Real> f, Vector<Real> dz, const Factors<Real>& factors,
                                    const Scale<Real>& scale) {
  if (!with_kd) return broadcast(factors.ce) * exp2(dz * scale.per_logit_1);
  const Vector<Real> d = broadcast(factors.student) * e - rounded(broadcast(factors.teacher) * f);
  return with_ce ? broadcast(factors.ce) * at_temperature_1<power>(e, dz, scale) + d : d;
}

// out[j] = element(j, m) for m = kLanes elements at j, or fewer at the ends.
template <bool streaming, class Real, class Element>
KCD_INLINE void write_piece(Real* out, int64_t n, const Element& element) {
  int64_t j = 0;
  if (streaming) {
    const int64_t head = elements_to_alignment(out);
    j = head < n ? head : n;
    if (j > 0) store(out, j, element(0, j));
  }
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    const Vector<Real> d = element(j, kLanes<Real>);
    streaming ? stream(out + j, d) : store<Real>(out + j, d);
  }
  if (j < n) store(out + j, n - j, element(j, n - j));
}

// The first m elements; no branch where it is known to be all.
template <class Real>
KCD_INLINE Vector<Real> load_some(const Real* p, int64_t m) {
  return m == kLanes<Real> ? load(p) : load(p, m, Real(0));
}

}   // namespace
}   // namespace kcd
