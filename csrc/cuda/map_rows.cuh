// The inverse of `rows=`: which row of the teacher belongs to a row of the student.
#pragma once
#include "cuda/port.h"

namespace kcd::cuda {

constexpr int64_t kNoRow = -1;
constexpr int64_t kNamedTwice = -2;   // such a row is a candidate whose KL is NaN

// rows[j] = i: the teacher's row j belongs to the student's row i.  Other entries are skipped.  teacher_row starts as kNoRow.
__global__ void __launch_bounds__(256) map_rows(const int64_t* rows, int64_t n, int64_t* teacher_row, int64_t student_rows) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= n || rows[j] < 0 || rows[j] >= student_rows) return;
  auto* entry = reinterpret_cast<unsigned long long*>(teacher_row + rows[j]);
  const auto none = static_cast<unsigned long long>(kNoRow);
  // Whichever thread comes second marks the row, so the order does not matter.
  if (atomicCAS(entry, none, static_cast<unsigned long long>(j)) != none)
    atomicExch(entry, static_cast<unsigned long long>(kNamedTwice));
}

}   // namespace kcd::cuda
