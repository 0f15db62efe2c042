// What a kernel is given and what it gives back.  No framework: pointers, sizes, strides in elements.
#pragma once
#include <cstdint>

#include "math/portable.h"

namespace kcd {

enum class Type : int32_t { float32, float64, float16, bfloat16 };

constexpr KCD_MEMBER int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// What rows are ranked by; `score`: numbers the caller brings.
enum class Value : int64_t { entropy, teacher_entropy, kl, cross_entropy, score };

enum class Reduction : int64_t { mean, sum, none };

// Logits of `rows` rows, classes contiguous.  Two strides, so that a slice such as logits[:, :-1] of a (sequences, tokens, classes)
// tensor is read where it lies.
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
  const int64_t* labels;   // without them every row is valid
  int64_t ignore_index;
  const int64_t* teacher_row;   // the teacher's row of each student's row, -1: none; null: the same row

  KCD_MEMBER bool valid(int64_t i) const { return !with_labels || labels[i] != ignore_index; }
  KCD_MEMBER int64_t teacher_row_of(int64_t i) const { return !with_teacher ? -1 : teacher_row ? teacher_row[i] : i; }
};

// What the forward pass keeps of every row: an array of `rows` numbers each, side by side, of the accumulator's type (double where
// the student is float64, else float).  Rows that are not valid have NaN in entropy, rows whose teacher is not read NaN in kl (0
// where a call has no teacher).  Maxima and inverse sums apart, for their log-sum-exp would lose the digits of logits like 1e4.
enum Stats : int32_t {
  kEntropy,
  kKl,
  kStudentMax,
  kStudentInverseSum,
  kTeacherMax,
  kTeacherInverseSum,
  kStudentInverseSum1,
  kStatsRows
};

// The state: one block of bytes, so that it is one tensor, by which the backward pass and `Knowledge` know the forward pass.
//
//   counts     int64 (2,)                how many rows are selected, how many are valid
//   value      (rows,)                   what rows are ranked by; NaN in rows that are no candidates.  In the accumulator's type,
//                                        or double: at least as wide as the statistics, so that nothing needs padding
//   stats      (kStatsRows, rows)        the accumulator's type
//   selected   bool (rows,)
//
// kcd_ext/ops.py reads it by the numbers that csrc/module.cpp hands on.
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

// What stands in a row of the gradient while it is not known which rows are selected.
enum Written : uint8_t { kNotWritten, kAsSelected, kAsNotSelected };

struct RowOutputs {
  void* stats;             // (kStatsRows, rows)
  void* cross_entropy;     // 0 in rows that are not valid; null: not asked for
  void* teacher_entropy;   // null: not asked for
};

// d loss / d z_i = ce_i (softmax(z_i) - onehot(label_i)) + kd_i (softmax(z_i / T) - softmax(y_i / T)); a row whose two factors are
// both absent is not read.
struct Gradient {
  const void* stats;         // as written by the forward pass
  const uint8_t* selected;   // bool, one a row
  uint8_t* written;          // rows whose gradient stands already; null: none does
  const void* value;         // accumulator's type: what rows are ranked by, known as soon as a row is read; null: not known so soon
  double share;              // of the rows that are to be selected
  const void* row_weight;    // accumulator's type; null: 1
  const void* grad_output;   // accumulator's type; one a row where grad_output_stride is 1, one in all where it is 0; null: 1
  int64_t grad_output_stride;
  double kd_factor, ce_factor;   // kd_weight T / |S| and ce_weight / n_valid
  Logits out;                    // the student's type; may be the student's own memory
  bool streaming;                // whether it is written past the caches
};

namespace cpu {

// A row that several threads sum: each some of its pieces, then one of them the row.
struct SplitRow {
  int64_t piece;            // classes of one
  int64_t bytes_of_piece;   // what is left of one, by double accumulators
  // Pieces [begin, end) of row i, which is read: sums has room for all pieces of the row.
  void (*sum_pieces)(const Problem&, const RowOutputs&, int64_t i, int64_t begin, int64_t end, void* sums);
  void (*finish_row)(const Problem&, const RowOutputs&, int64_t i, const void* sums);
};

// The kernels of one instruction set; a call does rows [begin, end) on the calling thread.
struct Kernels {
  const char* name;
  // With a gradient it writes that of every row it reads with its teacher, where it can do so from the exponentials at hand, at a
  // guess whether the row will be selected; it says so in `written`, and the backward kernel writes the rest.
  void (*forward)(const Problem&, const RowOutputs&, const Gradient*, int64_t begin, int64_t end);
  void (*backward)(const Problem&, const Gradient&, int64_t begin, int64_t end);
  const SplitRow* split_row;
  void (*write_pieces)(const Problem&, const Gradient&, int64_t i, int64_t begin, int64_t end);   // backward of a row's pieces
};

const Kernels& kernels();          // the set in use: the best this processor has, or the one KCD_ISA names
const char* const* built_sets();   // names, best first, null at the end

// The k candidates of greatest value, ties to the lower row; NaN ranks above everything.  k <= number of candidates.
void select(const float* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected);
void select(const double* value, const uint8_t* candidate, int64_t rows, int64_t k, uint8_t* selected);

}   // namespace cpu
}   // namespace kcd
