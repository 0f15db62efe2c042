// The CUDA kernels as plain functions.  They put work on a stream and wait for nothing; what they are given lies in device memory.
// Each throws std::runtime_error naming kernel and shape if CUDA refuses it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace kcd::cuda {

struct Machine {
  int processors;   // multiprocessors
  void* stream;
  int threads;   // of a block where nothing asks for more; 256 but in tests
};

// The current device's number, and its stream.  The first call for a device loads every kernel there, so that a CUDA graph that is
// captured later loads none.
Machine machine_of(int device, void* stream);

// Why a driver for CUDA `driver` cannot run kernels built by CUDA `runtime`, as CUDA numbers its versions (13000 is 13.0; a driver
// of 0: there is none); empty where it can: within a major version every driver serves every runtime.
std::string version_problem(int driver, int runtime);

// What the kernels were compiled by, such as "nvcc 13.0.88", and for, such as "sm_75 sm_80".
std::string compiler();
std::string architectures();

// Rows ranked, and what the ranking selects.
struct Keep {
  double fraction;
  int64_t count;   // 0: the fraction counts
};

// How rows add up to the loss.
struct Sum {
  const void* row_weight;        // accumulator's type; null: 1
  double kd_factor, ce_weight;   // kd_weight T^2
  Reduction reduction;
  double ranks;   // processes whose rows the counts count
};

// What the forward pass does beyond the rows.
struct Loss {
  Keep keep;
  Sum sum;
  uint8_t* selected;
  void* loss;
  int64_t* counts;   // rows selected, rows valid
};

struct Forward {
  Problem problem;
  RowOutputs outputs;
  Value value;
  const void* score;   // for Value::score
  bool value_is_double;
  void* ranked;         // what rows are ranked by, as the caller is to see it
  uint8_t* candidate;   // null: not asked for
  const Loss* loss;     // null: rows alone
};

struct Backward {
  Problem problem;
  const void* stats;
  const uint8_t* selected;
  const void *row_weight, *grad_output;
  int64_t grad_output_stride;
  const int64_t* counts;
  double kd_factor, ce_weight;   // kd_weight T
  Reduction reduction;
  double ranks;
  Logits out;
};

struct Select {
  const void* value;
  bool value_is_double;
  const uint8_t* candidate;
  int64_t rows;
  Keep keep;
  uint8_t* selected;
};

struct Reduce {
  Problem problem;   // of the logits only their type counts
  const void *kl, *cross_entropy;
  const uint8_t* selected;
  const int64_t* counts;
  Sum sum;
  void* loss;
};

// What a call needs beside its arguments, in bytes.
size_t workspace_of(const Forward&, const Machine&);
size_t workspace_of(const Select&, const Machine&);
size_t workspace_of(const Reduce&, const Machine&);

void forward(const Forward&, const Machine&, void* workspace);
void backward(const Backward&, const Machine&);
void select(const Select&, const Machine&, void* workspace);
void reduce(const Reduce&, const Machine&, void* workspace);

void clear(const State&, const Machine&);

// teacher_row[i]: the teacher's row of student's row i, as named by rows[0..n), or -1 for none.
void map_teacher_rows(const int64_t* rows, int64_t n, int64_t* teacher_row, int64_t student_rows, const Machine&);

}   // namespace kcd::cuda
