// A call on the CPU: O(rows) bookkeeping here, logits in the kernels of csrc/cpu.  The operators and the eager fast path are thin
// shells of it.
#pragma once
#include <vector>

#include "torch/call.h"

namespace kcd {

// A call whose labels and rows have been looked at.
class CpuCall : public Call {
 public:
  // Raises std::out_of_range for a label or a row that does not exist.
  explicit CpuCall(Call call) : Call(call) {
    if (problem.with_labels) check_labels();
    if (rows_are_named) map_teacher_rows();
  }

  // Runs a kernel over the rows on torch's threads; so many classes are worth waking one, about 10 us of work.
  template <class Body>
  void over_rows(int64_t classes_a_piece, const Body& body) const {
    constexpr int64_t kRow = 128;   // what begins and ends a row takes as long as so many classes
    over(problem.rows, std::max<int64_t>(1, classes_a_piece / (problem.classes + kRow)), body);
  }

  // With fewer rows than threads: runs a kernel over pieces [begin, end) of row i.
  template <class Body>
  void over_pieces(int64_t classes_a_task, int64_t piece, const Body& body) const {
    const int64_t pieces = (problem.classes + piece - 1) / piece, a_task = std::max<int64_t>(1, classes_a_task / piece);
    const int64_t tasks = (pieces + a_task - 1) / a_task;   // of a row
    over(problem.rows * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % tasks * a_task;
        body(task / tasks, first, std::min(first + a_task, pieces));
      }
    });
  }

 private:
  template <class Body>
  static void over(int64_t n, int64_t grain, const Body& body) {
    n <= grain ? body(int64_t{0}, n) : parallel_for(n, grain, body);
  }
  void check_labels() const;
  void map_teacher_rows();

  std::vector<int64_t> teacher_row_;   // a move leaves its numbers where they are
};

// ---- what calls do

// What rows are ranked by and what is kept of them.
struct Rows {
  void* value;           // of the scores' dtype, or the accumulator's
  void* stats;           // (kStatsRows, rows) of the accumulator's
  void* cross_entropy;   // the accumulator's; not null where there are labels
  const uint8_t* candidate;
};
void read_rows(const CpuCall& call, const View& score, Value value, const Rows& rows, const Gradient* gradient = nullptr);

void select(const void* value, bool is_double, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected);

void reduce(const Call& call, const LossOptions& options, const View& row_weight, const State& state, const void* cross_entropy,
            void* loss);

// gradient: where that of the loss goes, if a.with_gradient.
void forward(const ForwardCall& a, const CpuCall& call, void* loss, const State& state, const Logits& gradient);

void write_gradient(const BackwardCall& a, const CpuCall& call, const Logits& out);

}   // namespace kcd
