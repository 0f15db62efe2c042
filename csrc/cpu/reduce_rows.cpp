#include "cpu/reduce_rows.h"

namespace kcd::cpu {

int64_t mark_candidates(const Problem& problem, uint8_t* candidate) {
  int64_t n = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    candidate[i] = problem.valid(i) && (!problem.with_teacher || problem.teacher_row_of(i) >= 0);
    n += candidate[i];
  }
  return n;
}

int64_t count_valid(const Problem& problem) {
  int64_t n = 0;
  for (int64_t i = 0; i < problem.rows; ++i) n += problem.valid(i);
  return n;
}

}   // namespace kcd::cpu
