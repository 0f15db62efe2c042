// The operators' work on the CPU: O(rows) bookkeeping here, logits in the kernels of csrc/cpu.  cpu_ops.cpp and the eager fast path
// wrap it.
#pragma once
#include "torch/cpu_call.h"

namespace kcd::cpu {

// Arrays over rows: the candidates, and the outputs of row_stats.
struct Rows {
  void* value;           // ranking values, in the scores' dtype or the accumulator's
  void* stats;           // (kStatsRows, rows) in the accumulator's dtype
  void* cross_entropy;   // accumulator's dtype; null only without labels
  const uint8_t* candidate;
};

// Computes statistics, cross entropies and ranking values of all rows; given a gradient, also writes the rows of it that it can.
void row_stats(const CpuCall& call, const View& score, Value value, const Rows& rows, const Gradient* gradient = nullptr);

void select_topk(const void* value, bool is_double, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected);

void reduce_rows(const Call& call, const LossOptions& options, const View& row_weight, const State& state,
                 const void* cross_entropy, void* loss);

// row_stats, select_topk and reduce_rows.  Writes the gradient of the loss to `gradient` if a.with_gradient.
void condensed_kd(const CondensedKDArguments& a, const CpuCall& call, void* loss, const State& state, const Logits& gradient);

void condensed_kd_backward(const CondensedKDBackwardArguments& a, const CpuCall& call, const Logits& out);

}   // namespace kcd::cpu
