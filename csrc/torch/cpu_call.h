// A checked call on the CPU, and how its rows are distributed over threads.
#pragma once
#include <vector>

#include "torch/call.h"

namespace kcd {

// A call whose labels and row indices have been checked too.
class CpuCall : public Call {
 public:
  // Throws std::out_of_range for a label or row index out of range.
  explicit CpuCall(Call call) : Call(call) {
    if (problem.labels) check_labels();
    if (has_row_indices) map_teacher_rows();
  }

  // Runs body(begin, end) over the rows on torch's threads.  A thread gets at least `task_classes` classes, about 10 us of work.
  template <class Body>
  void over_rows(int64_t task_classes, const Body& body) const {
    constexpr int64_t kRowOverhead = 128;   // the fixed cost of a row, in classes
    run_parallel(problem.rows, std::max<int64_t>(1, task_classes / (problem.classes + kRowOverhead)), body);
  }

  // For calls with fewer rows than threads: runs body(i, begin, end) over pieces [begin, end) of each row i.
  template <class Body>
  void over_pieces(int64_t task_classes, int64_t piece_classes, const Body& body) const {
    const int64_t pieces = (problem.classes + piece_classes - 1) / piece_classes;
    const int64_t task_pieces = std::max<int64_t>(1, task_classes / piece_classes);
    const int64_t row_tasks = (pieces + task_pieces - 1) / task_pieces;
    run_parallel(problem.rows * row_tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % row_tasks * task_pieces;
        body(task / row_tasks, first, std::min(first + task_pieces, pieces));
      }
    });
  }

 private:
  template <class Body>
  static void run_parallel(int64_t n, int64_t grain, const Body& body) {
    n <= grain ? body(int64_t{0}, n) : parallel_for(n, grain, body);
  }
  void check_labels() const;
  void map_teacher_rows();

  std::vector<int64_t> teacher_row_;   // problem.teacher_row points to its data, which a move keeps
};

}   // namespace kcd
