// The outputs of the forward pass for a row, from its sums.
#pragma once
#include "kernels.h"
#include "math/row_stats.h"

namespace kcd {

template <class Real>
struct RowResults {
  Real entropy, kl, cross_entropy, teacher_entropy;   // if not read: NaN, NaN (0 without a teacher), 0, 0
};

// Writes the outputs of row i and returns them.  with_teacher: whether the teacher's row was read.  label_logit: the student's
// logit of the label; NaN if there is no such class.
template <class Real>
KCD_INLINE RowResults<Real> write_row_outputs(const Problem& problem, const RowOutputs& outputs, int64_t i, bool with_teacher,
                                              const RowSums<Real>& sums, Real label_logit, const Units<Real>& units) {
  const bool valid = problem.valid(i);
  const Real nan = Limits<Real>::nan();
  RowResults<Real> row{nan, problem.with_teacher ? nan : 0, 0, 0};
  if (valid) row.entropy = entropy(sums.student);
  if (with_teacher) row.kl = kl(sums, units);
  if (outputs.cross_entropy) {
    if (valid) row.cross_entropy = cross_entropy(sums.student, label_logit);
    static_cast<Real*>(outputs.cross_entropy)[i] = row.cross_entropy;
  }
  if (outputs.teacher_entropy) {
    if (with_teacher) row.teacher_entropy = entropy(sums.teacher);
    static_cast<Real*>(outputs.teacher_entropy)[i] = row.teacher_entropy;
  }
  Real* stats = static_cast<Real*>(outputs.stats) + i;
  stats[kEntropy * problem.rows] = row.entropy;
  stats[kKl * problem.rows] = row.kl;
  stats[kStudentMax * problem.rows] = piece_reference(sums.student.max);
  stats[kStudentInverseSum * problem.rows] = 1 / sums.student.sum();
  stats[kTeacherMax * problem.rows] = piece_reference(sums.teacher.max);
  stats[kTeacherInverseSum * problem.rows] = 1 / sums.teacher.sum();
  stats[kStudentInverseSum1 * problem.rows] = 1 / sums.student.sum_1();
  return row;
}

}   // namespace kcd
