#include "torch/cpu_call.h"

namespace kcd {

void CpuCall::check_labels() const {
  for (int64_t i = 0; i < problem.rows; ++i) {
    const int64_t label = problem.labels[i];
    if ((label < 0 || label >= problem.classes) && label != problem.ignore_index)
      throw std::out_of_range("labels[" + std::to_string(i) + "] is " + std::to_string(label) + ": it must be in [0, " +
                              std::to_string(problem.classes) + ") or be ignore_index " + std::to_string(problem.ignore_index));
  }
}

// row_indices[j] = i maps the teacher's row j to the student's row i.
void CpuCall::map_teacher_rows() {
  teacher_row_.assign(static_cast<size_t>(problem.rows), -1);
  for (int64_t j = 0; j < teacher_rows; ++j) {
    const int64_t i = row_indices[j];
    if (i == -1) continue;
    if (i < -1 || i >= problem.rows)
      throw std::out_of_range("rows[" + std::to_string(j) + "] is " + std::to_string(i) + ": it must be in [0, " +
                              std::to_string(problem.rows) + "), or be -1 to be skipped");
    if (teacher_row_[i] >= 0) throw std::invalid_argument("rows names row " + std::to_string(i) + " more than once");
    teacher_row_[i] = j;
  }
  problem.teacher_row = teacher_row_.data();
}

}   // namespace kcd
