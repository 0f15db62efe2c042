// The formula of the gradient for a piece of a row, from exponentials that are computed here or stored by the forward pass.
//
// Both passes take exponentials relative to the maxima of the piece and lower the row's factors by the distance between the piece's
// maximum and the row's.  So both give the same bits.
#pragma once
#include <algorithm>

#include "cpu/convert.h"
#include "cpu/targets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"
#include "math/row_stats.h"

namespace kcd {
namespace {

// d = student e^((z - m_z)/T) - teacher e^((y - m_y)/T) + ce e^(z - m_z) - ce_factor t, where m_z and m_y are the maxima of the row
// or the piece.  Each factor is the loss's factor divided by the row's sum.
template <class Real>
struct Factors {
  Real student_max, teacher_max;
  Real student;   // kd / sum e^((z - m_z)/T)
  Real teacher;   // kd / sum e^((y - m_y)/T)
  Real ce;        // ce_factor mass / sum e^(z - m_z)

  // The shifts are 0 in a row of one piece.  Skipping its three exponentials saves a tenth of the time for 100 classes.
  KCD_MEMBER Factors relative_to_piece(Real piece_student_max, Real piece_teacher_max, Real inverse_temperature) const {
    const Real student_shift = shift(piece_student_max, student_max), teacher_shift = shift(piece_teacher_max, teacher_max);
    if (student_shift == 0 && teacher_shift == 0) return *this;
    return {piece_reference(piece_student_max), piece_reference(piece_teacher_max),
            student * exponential(student_shift * inverse_temperature), teacher * exponential(teacher_shift * inverse_temperature),
            ce * exponential(student_shift)};
  }
};

// Factors broadcast to all lanes, once per piece: the compiler would reload factors from memory after every store in the loop.
template <class Real>
struct FactorLanes {
  Vector<Real> student_max, teacher_max, student, teacher, ce;
  explicit FactorLanes(const Factors<Real>& factors)
      : student_max(broadcast(factors.student_max)),
        teacher_max(broadcast(factors.teacher_max)),
        student(broadcast(factors.student)),
        teacher(broadcast(factors.teacher)),
        ce(broadcast(factors.ce)) {}
};

// The terms of a gradient.  Terms are known at run time, StaticTerms at compile time (compare Pass in row_stats.cpp).  With
// targets, classes other than a class index have some.
struct Terms {
  bool kd, ce;
  Power power;
  static constexpr bool targets = false;
};
struct TermsWithTargets {
  bool kd;
  Power power;
  static constexpr bool ce = true, targets = true;
};
template <bool with_kd, bool with_ce, Power fixed_power>
struct StaticTerms {
  static constexpr bool kd = with_kd, ce = with_ce, targets = false;
  static constexpr Power power = fixed_power;
};

// Calls run with the terms, as StaticTerms in the common cases.
template <class Real, class Run>
KCD_INLINE void dispatch_terms(const Terms& terms, bool with_targets, const Run& run) {
  if (terms.ce && with_targets) return run(TermsWithTargets{terms.kd, terms.power});
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (terms.kd && !terms.ce) return run(StaticTerms<true, false, Power::one>{});   // only ce uses the power
    if (terms.ce && terms.power == Power::four)
      return terms.kd ? run(StaticTerms<true, true, Power::four>{}) : run(StaticTerms<false, true, Power::four>{});
    if (terms.ce && terms.power == Power::one)
      return terms.kd ? run(StaticTerms<true, true, Power::one>{}) : run(StaticTerms<false, true, Power::one>{});
  }
  run(terms);
}

// The gradient of one vector of classes.  dz = z - m_z is used only if a second exponential is needed.
template <class TermsType, class Real>
KCD_INLINE Vector<Real> gradient_vector(const TermsType& terms, Vector<Real> e, Vector<Real> f, Vector<Real> dz,
                                        const FactorLanes<Real>& factors, const Scale<Real>& scale) {
  Vector<Real> d{};
  if (terms.kd) d = factors.student * e - round_product(factors.teacher * f);
  if (!terms.ce) return d;
  const Mask<Real> nonzero = is_nonzero_at_temperature_1<Real>(terms.power, e, dz);
  return factors.ce * exp_at_temperature_1<Real>(terms.power, nonzero, e, dz, scale) + d;
}

// A row of the gradient, in the student's type.  At a class index `label`, label_ce is subtracted; a negative one means none.
template <class Real>
struct GradientRow {
  Type type;
  bool streaming;
  char* out;
  int64_t label = -1;
  Real label_ce = 0;
  Real ce = 0;
  TargetRow<Real> targets{};
};

// Row i of the gradient, whose cross entropy has the factor ce; 0 without one.
template <class Real>
KCD_INLINE GradientRow<Real> gradient_row(const Problem& problem, const Gradient& gradient, int64_t i, bool with_ce, Real ce) {
  GradientRow<Real> row{problem.student.type, gradient.streaming, const_cast<char*>(gradient.out.row(i))};
  if (!with_ce) return row;
  row.targets = target_row<Real>(problem, i);
  row.ce = ce;
  if (problem.labels) row.label = problem.labels[i], row.label_ce = ce * row.targets.smoothing.of_label;
  return row;
}

struct NoTargets {
  template <class Real>
  NoTargets(const TargetRow<Real>&, int64_t, int64_t) {}
};

// Stores element(j, m) as classes [j, j + m) of a piece, m <= kLanes.
template <class Real, class Out, bool streaming, class TermsType, class Element>
KCD_INLINE void write_elements(const TermsType& terms, const GradientRow<Real>& row, int64_t first, int64_t n,
                               const Element& element) {
  Out* out = reinterpret_cast<Out*>(row.out) + first;
  const int64_t label = row.label - first;
  const std::conditional_t<TermsType::targets, PieceTargets<Real>, NoTargets> targets(row.targets, first, n);
  Vector<Real> lanes{};
  for (int64_t j = 0; j < kLanes<Real>; ++j) lanes[j] = static_cast<Real>(j);
  const auto minus_targets = [&](int64_t j, int64_t m) KCD_LAMBDA {
    Vector<Real> d = element(j, m);
    if constexpr (TermsType::targets) d -= round_product(row.ce * targets.lanes(j, m));
    if (!terms.ce || label < j || label >= j + m) return d;
    return d - (lanes == broadcast(static_cast<Real>(label - j)) ? broadcast(row.label_ce) : Vector<Real>{});
  };
  int64_t j = 0;
  const auto store_up_to = [&](int64_t end) KCD_LAMBDA {
    if (j < end) store(out + j, end - j, minus_targets(j, end - j));
    j = end;
  };
  if (streaming) store_up_to(std::min(elements_to_alignment(out, kLanes<Real> * sizeof(Out)), n));
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    const Vector<Real> d = minus_targets(j, kLanes<Real>);
    streaming ? stream(out + j, d) : store(out + j, d);
  }
  store_up_to(n);
}

// Writes classes [first, first + n) of a row.
template <class TermsType, class Element>
KCD_INLINE void write_piece(const TermsType& terms, const GradientRow<float>& row, int64_t first, int64_t n,
                            const Element& element) {
  switch (row.type) {
    case Type::float16:
      return row.streaming ? write_elements<float, float16, true>(terms, row, first, n, element)
                           : write_elements<float, float16, false>(terms, row, first, n, element);
    case Type::bfloat16:
      return row.streaming ? write_elements<float, bfloat16, true>(terms, row, first, n, element)
                           : write_elements<float, bfloat16, false>(terms, row, first, n, element);
    default:
      return row.streaming ? write_elements<float, float, true>(terms, row, first, n, element)
                           : write_elements<float, float, false>(terms, row, first, n, element);
  }
}
template <class TermsType, class Element>
KCD_INLINE void write_piece(const TermsType& terms, const GradientRow<double>& row, int64_t first, int64_t n,
                            const Element& element) {
  row.streaming ? write_elements<double, double, true>(terms, row, first, n, element)
                : write_elements<double, double, false>(terms, row, first, n, element);
}

// Writes classes [first, first + n) of a row without either term.  Zero is all zero bytes in every type.
template <class Real>
void write_zeros(const GradientRow<Real>& row, int64_t first, int64_t n) {
  const int64_t bytes = n * size_of(row.type);
  char* out = row.out + first * size_of(row.type);
  int64_t j = row.streaming ? std::min(elements_to_alignment(out, KCD_VECTOR_BYTES), bytes) : 0;
  __builtin_memset(out, 0, static_cast<size_t>(j));
  for (; j + KCD_VECTOR_BYTES <= bytes; j += KCD_VECTOR_BYTES) {
    float* vector = reinterpret_cast<float*>(out + j);
    row.streaming ? stream(vector, Vector<float>{}) : store(vector, Vector<float>{});
  }
  __builtin_memset(out + j, 0, static_cast<size_t>(bytes - j));
}

// Writes classes [first, first + n) of a row from its logits.  The gradient may overwrite them: each element is read before it is
// written.
template <class TermsType, class Real>
void write_from_logits(TermsType terms, const Problem& problem, const char* student, const char* teacher, int64_t first, int64_t n,
                       const Factors<Real>& factors, const Scale<Real>& scale, const GradientRow<Real>& row) {
  alignas(64) Real z_scratch[kPiece], y_scratch[kPiece];
  const Real* z = load_piece(problem.student.type, student, first, n, z_scratch);
  const Real* y = terms.kd ? load_piece(problem.teacher.type, teacher, first, n, y_scratch) : nullptr;
  const FactorLanes<Real> piece_factors(
      factors.relative_to_piece(maximum(z, n), terms.kd ? maximum(y, n) : Real(0), scale.units.inverse_temperature));
  const Prefetcher prefetch_z(problem.student, student, first), prefetch_y(problem.teacher, teacher, first);
  write_piece(terms, row, first, n, [&](int64_t j, int64_t m) KCD_LAMBDA {
    prefetch_z.fetch(j);
    if (terms.kd) prefetch_y.fetch(j);
    const Vector<Real> dz = load_lanes(z + j, m) - piece_factors.student_max;
    const Vector<Real> e = exp2(dz * scale.per_logit);
    const Vector<Real> f = terms.kd ? exp2((load_lanes(y + j, m) - piece_factors.teacher_max) * scale.per_logit) : Vector<Real>{};
    return gradient_vector(terms, e, f, dz, piece_factors, scale);
  });
}

}   // namespace
}   // namespace kcd
