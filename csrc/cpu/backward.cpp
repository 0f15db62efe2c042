// The gradient: rows that count are read again, every element is written once.
// Compiled once for each instruction set; KCD_SET names the one at hand.
#include "cpu/convert.h"
#include "cpu/gradient.h"
#include "cpu/sets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"

namespace kcd::cpu::KCD_SET {
namespace {

template <Power power, bool with_kd, bool with_ce, class Real>
void gradient_of_row(const Problem& problem, const char* student, const char* teacher, const Factors<Real>& factors,
                     const Scale<Real>& scale, const Target<Real>& target) {
  for (int64_t first = 0; first < problem.classes; first += kPiece) {
    const int64_t n = problem.classes - first < kPiece ? problem.classes - first : kPiece;
    write_from_logits<power, with_kd, with_ce>(problem, student, teacher, first, n, factors, scale, target);
  }
}

void zero(char* row, int64_t bytes, bool streaming) {
  int64_t j = 0;
  if (streaming) {
    const int64_t head = elements_to_alignment(row, KCD_VECTOR_BYTES);
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
  const Scale<Real> scale(problem.temperature);
  const int64_t row_bytes = problem.classes * size_of(problem.student.type);
  for (int64_t i = begin; i < end; ++i) {
    char* row = const_cast<char*>(gradient.out.row(i));
    const bool with_ce = problem.with_labels && gradient.ce_factor != 0 && problem.valid(i), with_kd = gradient.selected[i];
    if (with_kd && gradient.written && gradient.written[i]) continue;
    if (!with_ce && !with_kd) {
      zero(row, row_bytes, gradient.streaming);
      continue;
    }
    const char* student = problem.student.row(i);
    const char* teacher = with_kd ? problem.teacher.row(problem.teacher_row_of(i)) : nullptr;
    const double g = grad_output ? static_cast<double>(grad_output[i * gradient.grad_output_stride]) : 1.0;
    const Real kd = static_cast<Real>(g * gradient.kd_factor * (row_weight ? static_cast<double>(row_weight[i]) : 1.0));
    const Real ce = static_cast<Real>(g * gradient.ce_factor);
    const Factors<Real> factors{stats[kStudentMax * problem.rows + i], stats[kTeacherMax * problem.rows + i],
                                kd * stats[kStudentInverseSum * problem.rows + i],
                                kd * stats[kTeacherInverseSum * problem.rows + i],
                                ce * stats[kStudentInverseSum1 * problem.rows + i]};
    const Target<Real> target{problem.student.type, gradient.streaming, row, with_ce ? problem.labels[i] : -1, ce};
    (with_kd && with_ce) ? gradient_of_row<power, true, true>(problem, student, teacher, factors, scale, target)
    : with_kd            ? gradient_of_row<power, true, false>(problem, student, teacher, factors, scale, target)
                         : gradient_of_row<Power::other, false, true>(problem, student, teacher, factors, scale, target);
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
