// The outputs of the forward pass for a row, from its sums.
#pragma once
#include "kernels.h"
#include "math/row_stats.h"

namespace kcd {

template <class Real>
struct RowResults {
  Real entropy, kl, cross_entropy, teacher_entropy;   // if not read: NaN, NaN (0 without a teacher), 0, 0
};

// The targets of a row whose label is a class index, without smoothing.  label_logit: the student's logit of that class; NaN if
// there is no such class.
template <class Real>
KCD_INLINE TargetSums<Real> index_targets(const ClassSums<Real>& student, Real label_logit) {
  return {Real(1), label_logit - piece_reference(student.max)};
}

// The targets of any row: those summed over its classes, and that of a class index.
template <class Real>
KCD_INLINE TargetSums<Real> row_targets(const Problem& problem, const ClassSums<Real>& student, const TargetSums<Real>& summed,
                                        Real label_logit) {
  if (problem.soft_labels) return summed;
  const TargetSums<Real> index = index_targets(student, label_logit);
  if (!problem.with_targets()) return index;
  const Real of_label = smoothing_of<Real>(problem.label_smoothing, problem.classes).of_label;
  return {index.mass, summed.dot + target_times(of_label, index.dot)};
}

// Writes the outputs of row i and returns them.  with_teacher: whether the teacher's row was read.
template <class Real>
KCD_INLINE RowResults<Real> write_row_outputs(const Problem& problem, const RowOutputs& outputs, int64_t i, bool with_teacher,
                                              const RowSums<Real>& sums, const TargetSums<Real>& targets,
                                              const Units<Real>& units) {
  const bool valid = problem.valid(i);
  const Real nan = Limits<Real>::nan();
  RowResults<Real> row{nan, problem.with_teacher ? nan : 0, 0, 0};
  if (valid) row.entropy = entropy(sums.student);
  if (with_teacher) row.kl = kl(sums, units);
  if (outputs.cross_entropy) {
    if (valid) row.cross_entropy = cross_entropy(sums.student, targets);
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
  stats[kMassPerSum1 * problem.rows] = mass_per_sum_1(sums.student, targets);
  return row;
}

}   // namespace kcd
