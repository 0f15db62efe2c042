// The formula of the gradient for a piece of a row, out of exponentials that are computed, or that the forward pass has at hand.
//
// Exponentials are relative to the maxima of the piece, as in the forward pass, and every factor of the row is lowered by what the
// piece's maximum lies below the row's: both ways give the same bits.
#pragma once
#include <algorithm>

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

// Which terms a gradient has, as Pass (forward.cpp) says what is summed: UsualTerms are known while compiling.
struct Terms {
  bool kd, ce;
  Power power;
};
template <bool with_kd, bool with_ce, Power fixed_power>
struct UsualTerms {
  static constexpr bool kd = with_kd, ce = with_ce;
  static constexpr Power power = fixed_power;
};

// run(the terms, as UsualTerms where they are)
template <class Real, class Run>
KCD_INLINE void with_terms(const Terms& terms, const Run& run) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (terms.kd && !terms.ce) return run(UsualTerms<true, false, Power::one>{});   // the power counts for ce alone
    if (terms.ce && terms.power == Power::four)
      return terms.kd ? run(UsualTerms<true, true, Power::four>{}) : run(UsualTerms<false, true, Power::four>{});
    if (terms.ce && terms.power == Power::one)
      return terms.kd ? run(UsualTerms<true, true, Power::one>{}) : run(UsualTerms<false, true, Power::one>{});
  }
  run(terms);
}

// One vector of classes; dz = z - m_z counts where a second exponential is needed.
template <class SomeTerms, class Real>
KCD_INLINE Vector<Real> gradient_of(const SomeTerms& terms, Vector<Real> e, Vector<Real> f, Vector<Real> dz,
                                    const FactorLanes<Real>& factors, const Scale<Real>& scale) {
  Vector<Real> d{};
  if (terms.kd) d = factors.student * e - rounded(factors.teacher * f);
  if (!terms.ce) return d;
  const Mask<Real> counts = counts_at_temperature_1<Real>(terms.power, e, dz);
  return factors.ce * at_temperature_1<Real>(terms.power, counts, e, dz, scale) + d;
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

// out[j] = element(j, m) for classes j to j + m of a piece, m = kLanes or less.
template <class Real, class Out, bool streaming, class SomeTerms, class Element>
KCD_INLINE void write(const SomeTerms& terms, const Target<Real>& target, int64_t first, int64_t n, const Element& element) {
  Out* out = reinterpret_cast<Out*>(target.row) + first;
  const int64_t label = target.label - first;
  Vector<Real> lanes{};
  for (int64_t j = 0; j < kLanes<Real>; ++j) lanes[j] = static_cast<Real>(j);
  const auto minus_label = [&](int64_t j, int64_t m) KCD_LAMBDA {
    const Vector<Real> d = element(j, m);
    if (!terms.ce || label < j || label >= j + m) return d;
    return d - (lanes == broadcast(static_cast<Real>(label - j)) ? broadcast(target.ce) : Vector<Real>{});
  };
  int64_t j = 0;
  const auto store_rest = [&](int64_t end) KCD_LAMBDA {
    if (j < end) store(out + j, end - j, minus_label(j, end - j));
    j = end;
  };
  if (streaming) store_rest(std::min(elements_to_alignment(out, kLanes<Real> * sizeof(Out)), n));
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    const Vector<Real> d = minus_label(j, kLanes<Real>);
    streaming ? stream(out + j, d) : store(out + j, d);
  }
  store_rest(n);
}

// Classes [first, first + n) of a row.
template <class SomeTerms, class Element>
KCD_INLINE void write_piece(const SomeTerms& terms, const Target<float>& target, int64_t first, int64_t n, const Element& element) {
  switch (target.type) {
    case Type::float16:
      return target.streaming ? write<float, float16, true>(terms, target, first, n, element)
                              : write<float, float16, false>(terms, target, first, n, element);
    case Type::bfloat16:
      return target.streaming ? write<float, bfloat16, true>(terms, target, first, n, element)
                              : write<float, bfloat16, false>(terms, target, first, n, element);
    default:
      return target.streaming ? write<float, float, true>(terms, target, first, n, element)
                              : write<float, float, false>(terms, target, first, n, element);
  }
}
template <class SomeTerms, class Element>
KCD_INLINE void write_piece(const SomeTerms& terms, const Target<double>& target, int64_t first, int64_t n,
                            const Element& element) {
  target.streaming ? write<double, double, true>(terms, target, first, n, element)
                   : write<double, double, false>(terms, target, first, n, element);
}

// Classes [first, first + n) of a row that has neither term: zeros, which are zero bytes in every type.
template <class Real>
void write_zeros(const Target<Real>& target, int64_t first, int64_t n) {
  const int64_t bytes = n * size_of(target.type);
  char* out = target.row + first * size_of(target.type);
  int64_t j = target.streaming ? std::min(elements_to_alignment(out, KCD_VECTOR_BYTES), bytes) : 0;
  __builtin_memset(out, 0, static_cast<size_t>(j));
  for (; j + KCD_VECTOR_BYTES <= bytes; j += KCD_VECTOR_BYTES) {
    float* vector = reinterpret_cast<float*>(out + j);
    target.streaming ? stream(vector, Vector<float>{}) : store(vector, Vector<float>{});
  }
  __builtin_memset(out + j, 0, static_cast<size_t>(bytes - j));
}

// The first m elements; no branch where it is known to be all.
template <class Real>
KCD_INLINE Vector<Real> load_some(const Real* p, int64_t m) {
  return m == kLanes<Real> ? load(p) : load(p, m, Real(0));
}

// Classes [first, first + n) of a row, out of its logits.  The gradient may take their place: an element is read before it is
// written.
template <class SomeTerms, class Real>
void write_from_logits(SomeTerms terms, const Problem& problem, const char* student, const char* teacher, int64_t first, int64_t n,
                       const Factors<Real>& factors, const Scale<Real>& scale, const Target<Real>& target) {
  alignas(64) Real z_scratch[kPiece], y_scratch[kPiece];
  const Real* z = piece(problem.student.type, student, first, n, z_scratch);
  const Real* y = terms.kd ? piece(problem.teacher.type, teacher, first, n, y_scratch) : nullptr;
  const FactorLanes<Real> here(
      factors.of_piece(maximum(z, n), terms.kd ? maximum(y, n) : Real(0), scale.units.inverse_temperature));
  const Ahead later_z = ahead(problem.student, student, first), later_y = ahead(problem.teacher, teacher, first);
  write_piece(terms, target, first, n, [&](int64_t j, int64_t m) KCD_LAMBDA {
    later_z.fetch(j);
    if (terms.kd) later_y.fetch(j);
    const Vector<Real> dz = load_some(z + j, m) - here.student_max;
    const Vector<Real> e = exp2(dz * scale.per_logit);
    const Vector<Real> f = terms.kd ? exp2((load_some(y + j, m) - here.teacher_max) * scale.per_logit) : Vector<Real>{};
    return gradient_of(terms, e, f, dz, here, scale);
  });
}

}   // namespace
}   // namespace kcd
