// The formula of the gradient for a piece of a row, out of exponentials that are computed, or that the forward pass has at hand.
//
// Exponentials are relative to the maxima of the piece, as in the forward pass, and every factor of the row is lowered by what the
// piece's maximum lies below the row's: both ways give the same bits.
#pragma once
#include "cpu/convert.h"
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

  // In a row of one piece nothing falls, and e^0 is 1: three exponentials would be a tenth of the time of 100 classes.
  KCD_MEMBER Factors of_piece(Real piece_student_max, Real piece_teacher_max, Real inverse_temperature) const {
    const Real fall = shift(piece_student_max, student_max), teacher_fall = shift(piece_teacher_max, teacher_max);
    if (fall == 0 && teacher_fall == 0) return *this;
    return {reference(piece_student_max), reference(piece_teacher_max), student * exponential(fall * inverse_temperature),
            teacher * exponential(teacher_fall * inverse_temperature), ce * exponential(fall)};
  }
};

// The same in every lane, made once a piece: what is read from memory in the loop is read again after every write.
template <class Real>
struct FactorLanes {
  Vector<Real> student_max, teacher_max, student, teacher, ce;
  explicit FactorLanes(const Factors<Real>& of)
      : student_max(broadcast(of.student_max)),
        teacher_max(broadcast(of.teacher_max)),
        student(broadcast(of.student)),
        teacher(broadcast(of.teacher)),
        ce(broadcast(of.ce)) {}
};

// One vector of classes; dz = z - m_z counts where a second exponential is needed.
template <Power power, bool with_kd, bool with_ce, class Real>
KCD_INLINE Vector<Real> gradient_of(Vector<Real> e, Vector<Real> f, Vector<Real> dz, const FactorLanes<Real>& factors,
                                    const Scale<Real>& scale) {
  const Vector<Real> d = with_kd ? factors.student * e - rounded(factors.teacher * f) : Vector<Real>{};
  if (!with_ce) return d;
  const Mask<Real> counts = counts_at_temperature_1<power, Real>(e, dz);
  return factors.ce * at_temperature_1<power, Real>(counts, e, dz, scale) + d;
}

// out[j] = element(j, m) for m = kLanes elements at j, or fewer at the ends.
template <class Real, bool streaming, class Out, class Element>
KCD_INLINE void write(Out* out, int64_t n, const Element& element) {
  int64_t j = 0;
  if (streaming) {
    const int64_t head = elements_to_alignment(out, kLanes<Real> * sizeof(Out));
    j = head < n ? head : n;
    for (int64_t i = 0; i < j; i += kLanes<Real>) store(out + i, j - i < kLanes<Real> ? j - i : kLanes<Real>, element(i, j - i));
  }
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    const Vector<Real> d = element(j, kLanes<Real>);
    streaming ? stream(out + j, d) : store(out + j, d);
  }
  if (j < n) store(out + j, n - j, element(j, n - j));
}

// A row of the gradient, of the student's type.  label < 0: none; at the label ce is taken off: pi - onehot.
template <class Real>
struct Target {
  Type type;
  bool streaming;
  char* row;
  int64_t label;
  Real ce;
};

template <class Real, class Out, class Element>
KCD_INLINE void write(const Target<Real>& target, Out* out, int64_t n, const Element& element) {
  target.streaming ? write<Real, true>(out, n, element) : write<Real, false>(out, n, element);
}
template <class Element>
KCD_INLINE void write_by_type(const Target<float>& target, int64_t first, int64_t n, const Element& element) {
  switch (target.type) {
    case Type::float16:
      return write(target, reinterpret_cast<float16*>(target.row) + first, n, element);
    case Type::bfloat16:
      return write(target, reinterpret_cast<bfloat16*>(target.row) + first, n, element);
    default:
      return write(target, reinterpret_cast<float*>(target.row) + first, n, element);
  }
}
template <class Element>
KCD_INLINE void write_by_type(const Target<double>& target, int64_t first, int64_t n, const Element& element) {
  write(target, reinterpret_cast<double*>(target.row) + first, n, element);
}

// Classes [first, first + n) of a row.
template <class Real, class Element>
KCD_INLINE void write_piece(const Target<Real>& target, int64_t first, int64_t n, const Element& element) {
  const int64_t label = target.label - first;
  if (label < 0 || label >= n) return write_by_type(target, first, n, element);
  Vector<Real> lanes{};
  for (int64_t j = 0; j < kLanes<Real>; ++j) lanes[j] = static_cast<Real>(j);
  write_by_type(target, first, n, [&](int64_t j, int64_t m) {
    const Vector<Real> d = element(j, m);
    if (label < j || label >= j + m) return d;
    return d - (lanes == broadcast(static_cast<Real>(label - j)) ? broadcast(target.ce) : Vector<Real>{});
  });
}

// The first m elements; no branch where it is known to be all.
template <class Real>
KCD_INLINE Vector<Real> load_some(const Real* p, int64_t m) {
  return m == kLanes<Real> ? load(p) : load(p, m, Real(0));
}

// Classes [first, first + n) of a row, out of its logits.  The gradient may take their place: an element is read before it is
// written.
template <Power power, bool with_kd, bool with_ce, class Real>
KCD_INLINE void write_from_logits(const Problem& problem, const char* student, const char* teacher, int64_t first, int64_t n,
                                  const Factors<Real>& factors, const Scale<Real>& scale, const Target<Real>& target) {
  alignas(64) Real z_scratch[kPiece], y_scratch[kPiece];
  const Real* z = piece(problem.student.type, student, first, n, z_scratch);
  const Real* y = with_kd ? piece(problem.teacher.type, teacher, first, n, y_scratch) : nullptr;
  const FactorLanes<Real> here(factors.of_piece(maximum(z, n), with_kd ? maximum(y, n) : Real(0), scale.units.inverse_temperature));
  const Ahead later_z = ahead(problem.student, student, first), later_y = ahead(problem.teacher, teacher, first);
  write_piece(target, first, n, [&](int64_t j, int64_t m) {
    later_z.fetch(j);
    if (with_kd) later_y.fetch(j);
    const Vector<Real> dz = load_some(z + j, m) - here.student_max;
    const Vector<Real> e = exp2(dz * scale.per_logit);
    const Vector<Real> f = with_kd ? exp2((load_some(y + j, m) - here.teacher_max) * scale.per_logit) : Vector<Real>{};
    return gradient_of<power, with_kd, with_ce>(e, f, dz, here, scale);
  });
}

}   // namespace
}   // namespace kcd
