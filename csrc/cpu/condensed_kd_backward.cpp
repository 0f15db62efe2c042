// The gradient: reads the rows that have a term in it once more and writes every element once.
// Compiled once for each instruction set, in namespace KCD_INSTRUCTION_SET.
#include <algorithm>

#include "cpu/convert.h"
#include "cpu/gradient.h"
#include "cpu/instruction_sets.h"
#include "cpu/temperature.h"
#include "cpu/vector.h"

namespace kcd::cpu::KCD_INSTRUCTION_SET {
namespace {

// Writes classes [first, end) of row i, unless the forward pass has written the same.
template <class Real>
void write_gradient_row(const Problem& problem, const Gradient& gradient, const Scale<Real>& scale, int64_t i, int64_t first,
                        int64_t end) {
  const bool with_ce = problem.with_labels && gradient.ce_factor != 0 && problem.valid(i), with_kd = gradient.selected[i];
  if (gradient.written_as && gradient.written_as[i] == (with_kd ? kWrittenAsSelected : kWrittenAsUnselected)) return;
  if (!with_ce && !with_kd) return write_zeros(gradient_row<Real>(problem, gradient, i, false, 0), first, end - first);
  const Real* stats = static_cast<const Real*>(gradient.stats);
  const Real* row_weight = static_cast<const Real*>(gradient.row_weight);
  const Real* grad_output = static_cast<const Real*>(gradient.grad_output);
  const char* student = problem.student.row(i);
  const char* teacher = with_kd ? problem.teacher.row(problem.teacher_row_of(i)) : nullptr;
  const double g = grad_output ? static_cast<double>(grad_output[i * gradient.grad_output_stride]) : 1.0;
  const Real kd = static_cast<Real>(g * gradient.kd_factor * (row_weight ? static_cast<double>(row_weight[i]) : 1.0));
  const Real ce = static_cast<Real>(g * gradient.ce_factor);
  const Factors<Real> factors{stats[kStudentMax * problem.rows + i], stats[kTeacherMax * problem.rows + i],
                              kd * stats[kStudentInverseSum * problem.rows + i], kd * stats[kTeacherInverseSum * problem.rows + i],
                              ce * stats[kMassPerSum1 * problem.rows + i]};
  const GradientRow<Real> row = gradient_row(problem, gradient, i, with_ce, ce);
  dispatch_terms<Real>(Terms{with_kd, with_ce, power_for(problem.temperature)}, row.targets.exists, [&](const auto& terms) {
    for (int64_t j = first; j < end; j += kPiece)
      write_from_logits(terms, problem, student, teacher, j, std::min(kPiece, end - j), factors, scale, row);
  });
}

// Writes classes [first_class, end_class) of rows [begin, end).
template <class Real>
void write_gradient(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end, int64_t first_class,
                    int64_t end_class) {
  const Scale<Real> scale(problem.temperature);
  for (int64_t i = begin; i < end; ++i) write_gradient_row<Real>(problem, gradient, scale, i, first_class, end_class);
  if (gradient.streaming) stream_fence();
}

void write_gradient(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end, int64_t first_class,
                    int64_t end_class) {
  problem.student.type == Type::float64 ? write_gradient<double>(problem, gradient, begin, end, first_class, end_class)
                                        : write_gradient<float>(problem, gradient, begin, end, first_class, end_class);
}

}   // namespace

void condensed_kd_backward(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end) {
  write_gradient(problem, gradient, begin, end, 0, problem.classes);
}

void write_gradient_pieces(const Problem& problem, const Gradient& gradient, int64_t i, int64_t begin, int64_t end) {
  write_gradient(problem, gradient, i, i + 1, begin * kPiece, std::min(end * kPiece, problem.classes));
}

}   // namespace kcd::cpu::KCD_INSTRUCTION_SET
