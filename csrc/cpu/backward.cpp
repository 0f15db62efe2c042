// The gradient: rows that count are read again, every element is written once.
// Compiled once for each instruction set; KCD_SET names the one at hand.
#include "cpu/convert.h"
#include "cpu/sets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"
#include "math/row_stats.h"

namespace kcd::cpu::KCD_SET {
namespace {

// What one row's formula needs: d = ce pi + student q - teacher p with every factor folded into the inverse sum beside it.
template <class Real>
struct RowFactors {
  Real student_max, teacher_max;
  Real student, teacher;   // kd / sum e^(dz/T), kd / sum e^(dy/T)
  Real ce;                 // ce / sum e^dz
};

// The formula for one vector of classes.
template <Power power, bool with_kd, bool with_ce, class Real>
struct Element {
  Scale<Real> scale;
  Vector<Real> m_z, m_y, student, teacher, ce;
  Element(const RowFactors<Real>& f, double temperature)
      : scale(temperature),
        m_z(broadcast(f.student_max)),
        m_y(broadcast(f.teacher_max)),
        student(broadcast(f.student)),
        teacher(broadcast(f.teacher)),
        ce(broadcast(f.ce)) {}

  KCD_MEMBER Vector<Real> operator()(Vector<Real> z, Vector<Real> y) const {
    const Vector<Real> dz = z - m_z;
    if (!with_kd) return ce * exp2(dz * scale.per_logit_1);
    const Vector<Real> e = exp2(dz * scale.per_logit);
    const Vector<Real> d = student * e - teacher * exp2((y - m_y) * scale.per_logit);
    return with_ce ? d + ce * at_temperature_1<power>(e, dz, scale) : d;
  }
};

// `out` may be `z`: an element is read before it is written.
template <bool streaming, Power power, bool with_kd, bool with_ce, class Real>
KCD_INLINE void gradient_of_piece(const Real* z, const Real* y, int64_t n, const Element<power, with_kd, with_ce, Real>& element,
                                  Real* out, Ahead next_z, Ahead next_y) {
  const auto some = [&](int64_t j, int64_t m) {   // m < kLanes elements
    store(out + j, m, element(load(z + j, m, Real(0)), with_kd ? load(y + j, m, Real(0)) : Vector<Real>{}));
  };
  int64_t j = 0;
  if (streaming) {
    const int64_t head = elements_to_alignment(out);
    j = head < n ? head : n;
    if (j > 0) some(0, j);
  }
  for (; j + kLanes<Real> <= n; j += kLanes<Real>) {
    next_z.fetch(j);
    if (with_kd) next_y.fetch(j);
    const Vector<Real> d = element(load(z + j), with_kd ? load(y + j) : Vector<Real>{});
    streaming ? stream(out + j, d) : store<Real>(out + j, d);
  }
  if (j < n) some(j, n - j);
}

// label < 0: none; at the label ce_label is taken off: pi - onehot.
template <Power power, bool with_kd, bool with_ce, class Real>
void gradient_of_row(const Problem& problem, const char* student, const char* teacher, const RowFactors<Real>& factors,
                     int64_t label, Real ce_label, bool streaming, char* row) {
  alignas(64) Real z_scratch[kPiece], y_scratch[kPiece], scratch[kPiece];
  const Element<power, with_kd, with_ce, Real> element(factors, problem.temperature);
  const Type type = problem.student.type;
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    const Real* z = piece(type, student, first, n, z_scratch);
    const Real* y = with_kd ? piece(problem.teacher.type, teacher, first, n, y_scratch) : nullptr;
    Real* out = gradient_piece(type, row, first, scratch);
    const Ahead next_z = ahead(problem.student, student, first), next_y = ahead(problem.teacher, teacher, first);
    const int64_t at = with_ce && label >= first && label < first + n ? label - first : -1;
    const Real label_z = at < 0 ? Real(0) : z[at];   // read before it is written over
    (streaming && out != scratch) ? gradient_of_piece<true>(z, y, n, element, out, next_z, next_y)
                                  : gradient_of_piece<false>(z, y, n, element, out, next_z, next_y);
    if (at >= 0) {
      const Real label_y = with_kd ? y[at] : Real(0);
      out[at] = element(broadcast(label_z), broadcast(label_y))[0] - ce_label;
    }
    finish_gradient_piece(type, row, first, n, out);
  }
}

void zero(char* row, int64_t bytes, bool streaming) {
  int64_t j = 0;
  if (streaming) {
    const int64_t head = elements_to_alignment(row);
    j = head < bytes ? head : bytes;
    __builtin_memset(row, 0, static_cast<size_t>(j));
    for (; j + KCD_VECTOR_BYTES <= bytes; j += KCD_VECTOR_BYTES) stream(reinterpret_cast<float*>(row + j), Vector<float>{});
  }
  __builtin_memset(row + j, 0, static_cast<size_t>(bytes - j));
}

template <class Real, Power power>
void backward(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end) {
  const Real* stats = static_cast<const Real*>(gradient.stats);
  const Real* row_weight = static_cast<const Real*>(gradient.row_weight);
  const Real* grad_output = static_cast<const Real*>(gradient.grad_output);
  const int64_t row_bytes = problem.classes * size_of(problem.student.type);
  for (int64_t i = begin; i < end; ++i) {
    char* row = const_cast<char*>(gradient.out.row(i));
    const bool with_ce = problem.with_labels && gradient.ce_factor != 0 && problem.valid(i), with_kd = gradient.selected[i];
    if (!with_ce && !with_kd) {
      zero(row, row_bytes, gradient.streaming);
      continue;
    }
    const char* student = problem.student.row(i);
    const char* teacher = with_kd ? problem.teacher.row(problem.teacher_row_of(i)) : nullptr;
    const double g = static_cast<double>(grad_output[i * gradient.grad_output_stride]);
    const Real kd = static_cast<Real>(g * gradient.kd_factor * (row_weight ? static_cast<double>(row_weight[i]) : 1.0));
    const Real ce = static_cast<Real>(g * gradient.ce_factor);
    const RowFactors<Real> factors{stats[kStudentMax * problem.rows + i], stats[kTeacherMax * problem.rows + i],
                                   kd * stats[kStudentInverseSum * problem.rows + i],
                                   kd * stats[kTeacherInverseSum * problem.rows + i],
                                   ce * stats[kStudentInverseSum1 * problem.rows + i]};
    const int64_t label = with_ce ? problem.labels[i] : -1;
    const bool streaming = gradient.streaming;
    (with_kd && with_ce) ? gradient_of_row<power, true, true>(problem, student, teacher, factors, label, ce, streaming, row)
    : with_kd ? gradient_of_row<power, true, false>(problem, student, teacher, factors, label, ce, streaming, row)
              : gradient_of_row<Power::other, false, true>(problem, student, teacher, factors, label, ce, streaming, row);
  }
  if (gradient.streaming) stream_fence();
}

template <class Real>
void backward(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end) {
  with_power(problem.temperature, [&](auto power) { backward<Real, power.value>(problem, gradient, begin, end); });
}

}   // namespace

void backward(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end) {
  problem.student.type == Type::float64 ? backward<double>(problem, gradient, begin, end)
                                        : backward<float>(problem, gradient, begin, end);
}

}   // namespace kcd::cpu::KCD_SET
