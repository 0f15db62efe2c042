// The CUDA kernels as plain functions.  They queue work on a stream and never wait for it; all pointers are device pointers.
// Each throws std::runtime_error with the kernel and the shape if CUDA refuses the launch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace kcd::cuda {

struct DeviceContext {
  int num_sms;   // multiprocessors
  void* stream;
  int block_threads;   // default threads per block: 256, except in tests
};

// Returns the context of the current device, which must be `device`.  The first call for a device loads every kernel there, because
// loading one during CUDA graph capture would fail.
DeviceContext device_context(int device, void* stream);

// Returns why a driver for CUDA `driver` cannot run kernels built with CUDA `runtime`, or "" if it can: any driver of the same
// major version, or a later one, does.  Versions are CUDA's integers (13000 is 13.0); driver 0 means no driver.
std::string version_problem(int driver, int runtime);

std::string compiler();        // such as "nvcc 13.0.88"
std::string architectures();   // such as "sm_75 sm_80"

// How many of the ranked rows are selected.
struct Keep {
  double fraction;
  int64_t count;   // 0: use the fraction
};

// How rows are summed to the loss.
struct LossSumParams {
  const void* row_weight;        // accumulator's type; null: 1
  double kd_factor, ce_weight;   // kd_factor = kd_weight T^2
  Reduction reduction;
  double ranks;   // processes whose rows the counts include
};

// Selection and loss, computed by the same call as the row statistics: with it, launch_row_stats is condensed_kd.
struct FusedLoss {
  Keep keep;
  LossSumParams sum;
  uint8_t* selected;
  void* loss;
  int64_t* counts;   // selected rows, valid rows
};

struct RowStatsParams {
  Problem problem;
  RowOutputs outputs;
  Value value;
  const void* score;   // for Value::score
  bool value_is_double;
  void* ranked;            // out: the values that rows are ranked by
  uint8_t* candidate;      // out; null: not requested
  const FusedLoss* loss;   // null: row statistics only
};

struct CondensedKDBackwardParams {
  Problem problem;
  const void* stats;
  const uint8_t* selected;
  const void *row_weight, *grad_output;
  int64_t grad_output_stride;
  const int64_t* counts;
  double kd_factor, ce_weight;   // kd_factor = kd_weight T
  Reduction reduction;
  double ranks;
  Logits out;
};

struct SelectTopkParams {
  const void* value;
  bool value_is_double;
  const uint8_t* candidate;
  int64_t rows;
  Keep keep;
  uint8_t* selected;
};

struct ReduceRowsParams {
  Problem problem;   // of the logits only the type is used
  const void *kl, *cross_entropy;
  const uint8_t* selected;
  const int64_t* counts;
  LossSumParams sum;
  void* loss;
};

// Return the size of the workspace that the call needs, in bytes.
size_t workspace_bytes(const RowStatsParams&, const DeviceContext&);
size_t workspace_bytes(const SelectTopkParams&, const DeviceContext&);
size_t workspace_bytes(const ReduceRowsParams&, const DeviceContext&);

void launch_row_stats(const RowStatsParams&, const DeviceContext&, void* workspace);
void launch_condensed_kd_backward(const CondensedKDBackwardParams&, const DeviceContext&);
void launch_select_topk(const SelectTopkParams&, const DeviceContext&, void* workspace);
void launch_reduce_rows(const ReduceRowsParams&, const DeviceContext&, void* workspace);

void clear_state(const State&, const DeviceContext&);

// Inverts rows[0..n), which maps the teacher's rows to the student's.  teacher_row[i] becomes the teacher's row for the student's
// row i, or -1 if no teacher row belongs to it.
void launch_map_rows(const int64_t* rows, int64_t n, int64_t* teacher_row, int64_t student_rows, const DeviceContext&);

}   // namespace kcd::cuda
