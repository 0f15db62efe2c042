// The inputs and outputs of the kernels.  No framework: pointers, sizes, and strides in elements.
#pragma once
#include <cstdint>

#include "math/portable.h"

namespace kcd {

enum class Type : int32_t { float32, float64, float16, bfloat16 };

constexpr KCD_MEMBER int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// The value that ranks the rows; `score`: numbers from the caller.
enum class Value : int64_t { entropy, teacher_entropy, kl, cross_entropy, score };

enum class Reduction : int64_t { mean, sum, none };

// Rows of logits with contiguous classes.  Two strides let kernels read slices in place, such as logits[:, :-1] of a
// (sequences, tokens, classes) tensor.
struct Logits {
  const void* data;
  Type type;
  int64_t inner;   // rows of the inner leading dimension
  int64_t outer_stride, inner_stride;

  KCD_MEMBER const char* row(int64_t i) const {
    const int64_t element = i < inner ? i * inner_stride : i / inner * outer_stride + i % inner * inner_stride;
    return static_cast<const char*>(data) + element * size_of(type);
  }
};

struct Problem {
  Logits student, teacher;
  bool with_teacher, with_labels;
  int64_t rows, classes;
  double temperature;
  const int64_t* labels;   // class indices; null without them.  Without labels, and with probabilities, every row is valid
  int64_t ignore_index;
  const int64_t* teacher_row;   // teacher row of each student row, -1 for none; null: rows correspond one to one
  bool soft_labels;             // whether the labels are probabilities
  Logits label_probabilities;
  double label_smoothing;

  KCD_MEMBER bool valid(int64_t i) const { return !with_labels || soft_labels || labels[i] != ignore_index; }
  // Whether classes other than a class index have targets, so that the kernels sum over them.
  KCD_MEMBER bool with_targets() const { return soft_labels || label_smoothing > 0; }
  KCD_MEMBER int64_t teacher_row_of(int64_t i) const { return !with_teacher ? -1 : teacher_row ? teacher_row[i] : i; }
};

// The statistics that the forward pass stores: an array of `rows` numbers for each, one after another, in the accumulator's type
// (double for float64 students, else float).
//
// - Rows that are not valid have NaN as entropy.
// - Rows whose teacher was not read have NaN as kl (0 if the call has no teacher).
// - Maxima and inverse sums are separate: their log-sum-exp would lose the digits of logits as large as 1e4.
enum Stats : int32_t {
  kEntropy,
  kKl,
  kStudentMax,
  kStudentInverseSum,
  kTeacherMax,
  kTeacherInverseSum,
  kMassPerSum1,   // see mass_per_sum_1; the targets' mass is 1 unless labels are probabilities
  kStatsRows
};

// The state: everything that the backward pass and `Knowledge` need, in one block of bytes, so that it is one tensor.
//
//   counts     int64 (2,)            selected rows, valid rows
//   value      (rows,)               ranking values; NaN for rows that are not candidates.  The accumulator's type or double: at
//                                    least as wide as the statistics, so that no array needs padding
//   stats      (kStatsRows, rows)    the accumulator's type
//   selected   bool (rows,)
//
// kcd_ext/ops.py reads the state with the constants that csrc/module.cpp passes to it.
constexpr int64_t kCounts = 2;

struct State {
  char* data;
  int64_t rows, value_bytes, accumulator_bytes;   // bytes of one number

  int64_t* counts() const { return reinterpret_cast<int64_t*>(data); }
  char* value() const { return data + kCounts * 8; }
  char* stats() const { return value() + rows * value_bytes; }
  uint8_t* selected() const { return reinterpret_cast<uint8_t*>(stats() + kStatsRows * rows * accumulator_bytes); }
  int64_t bytes() const { return kCounts * 8 + rows * (value_bytes + kStatsRows * accumulator_bytes + 1); }
};

// The contents of a gradient row before the selection is known.
enum WrittenAs : uint8_t { kNotWritten, kWrittenAsSelected, kWrittenAsUnselected };

struct RowOutputs {
  void* stats;             // (kStatsRows, rows)
  void* cross_entropy;     // 0 for rows that are not valid; null: not requested
  void* teacher_entropy;   // null: not requested
};

// d loss / d z_i = ce_i (mass_i softmax(z_i) - t_i) + kd_i (softmax(z_i / T) - softmax(y_i / T)), with the targets t_i and their
// sum mass_i (math/row_stats.h).  A row without either term is not read.
struct Gradient {
  const void* stats;            // from the forward pass
  const uint8_t* selected;      // bool (rows,)
  uint8_t* written_as;          // WrittenAs (rows,); null: no row is written yet
  const void* value;            // ranking values in the accumulator's type, available as soon as a row is read; null: not available
  double selected_fraction;     // selected rows / candidates
  const void* row_weight;       // accumulator's type; null: 1
  const void* grad_output;      // accumulator's type; null: 1
  int64_t grad_output_stride;   // 1: one grad_output for each row; 0: one for all rows
  double kd_factor, ce_factor;   // kd_weight T / |S| and ce_weight / n_valid
  Logits out;                    // the student's type; may be the student's memory
  bool streaming;                // whether to bypass the caches
};

namespace cpu {

// Kernels for a row that several threads share: each thread sums some of the row's pieces, then one thread merges them.
struct SplitRowKernels {
  int64_t piece_classes;
  int64_t piece_bytes;   // size of a piece's sums, with double accumulators
  // Sums pieces [begin, end) of row i; does nothing if the row is not read.  `sums` has room for all pieces of the row.
  void (*sum_pieces)(const Problem&, const RowOutputs&, int64_t i, int64_t begin, int64_t end, void* sums);
  void (*merge_pieces)(const Problem&, const RowOutputs&, int64_t i, const void* sums);
};

// The kernels of one instruction set.  A call processes rows [begin, end) on the calling thread.
struct Kernels {
  const char* name;
  // Given a gradient, also writes the gradient of each row that it reads with a teacher, from the exponentials it has just
  // computed.  Rows with overflow or NaN are left out.  It predicts whether a row will be selected and records that in
  // `written_as`; condensed_kd_backward writes the rest.
  void (*row_stats)(const Problem&, const RowOutputs&, const Gradient*, int64_t begin, int64_t end);
  void (*condensed_kd_backward)(const Problem&, const Gradient&, int64_t begin, int64_t end);
  const SplitRowKernels* split_row;
  // The backward pass over pieces [begin, end) of row i.
  void (*write_gradient_pieces)(const Problem&, const Gradient&, int64_t i, int64_t begin, int64_t end);
};

const Kernels& kernels();                      // for the instruction set in use: the best supported one, or KCD_ISA
const char* const* built_instruction_sets();   // names, best first, null-terminated

// Selects the k candidates of greatest value.  The lower row wins ties; NaN ranks above everything.  Requires k <= candidates.
void select_topk(const float* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected);
void select_topk(const double* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected);

}   // namespace cpu
}   // namespace kcd
