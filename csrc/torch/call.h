// What every kernel of the operators begins with, whatever the device: arguments taken off the stack and checked, so that a wrong
// call through torch.ops does not read out of bounds.  What tensors hold is not looked at: it may lie in a device's memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "torch/abi.h"

namespace kcd {

struct Dtypes {
  int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(), float16 = aoti_torch_dtype_float16(),
          bfloat16 = aoti_torch_dtype_bfloat16(), int64 = aoti_torch_dtype_int64(), uint8 = aoti_torch_dtype_uint8(),
          boolean = aoti_torch_dtype_bool();
};
inline const Dtypes& dtypes() {
  static const Dtypes all;
  return all;
}

inline Type type_of(const View& logits) {
  const int32_t dtype = logits.dtype();
  if (dtype == dtypes().float32) return Type::float32;
  if (dtype == dtypes().float64) return Type::float64;
  if (dtype == dtypes().float16) return Type::float16;
  if (dtype == dtypes().bfloat16) return Type::bfloat16;
  throw std::invalid_argument("kcd_ext: logits must be float32, float64, float16 or bfloat16");
}

inline bool absent(const View& x) { return x.dtype() == dtypes().boolean; }
inline View absent_view() {
  static const int64_t size = 0, stride = 1;
  return {nullptr, &size, &stride, 1, dtypes().boolean, 0, 0};
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(std::string("kcd_ext: ") + message);
}

inline bool contiguous(const View& x) {
  int64_t step = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    if (x.sizes()[i] != 1 && x.strides()[i] != step) return false;
    step *= x.sizes()[i];
  }
  return true;
}

// The numbers of a tensor that must hold n of them, side by side.
inline const void* dense(const View& x, int32_t dtype, int64_t n, const char* message) {
  require(x.dtype() == dtype && x.numel() == n && (n == 0 || contiguous(x)), message);
  return x.data<void>();
}

// ---- shapes

// (..., classes) as rows of contiguous classes at two strides.
inline Logits logits_of(const View& x, const void* data) {
  const int64_t dim = x.dim(), *sizes = x.sizes(), *strides = x.strides();
  require(dim >= 1, "logits must have shape (..., classes)");
  if (x.numel() == 0) return {data, type_of(x), 1, 0, 0};
  require(sizes[dim - 1] <= 1 || strides[dim - 1] == 1, "the classes of a row must lie side by side");
  // Leading dimensions, from the inside out, as at most two runs in which each stride is the size times the stride before it.
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int run = -1;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (run >= 0 && strides[i] == size[run] * stride[run]) {
      size[run] *= sizes[i];
      continue;
    }
    require(++run < 2, "the rows of the logits must lie at no more than two strides");
    size[run] = sizes[i];
    stride[run] = strides[i];
  }
  return {data, type_of(x), std::max<int64_t>(size[0], 1), stride[1], stride[0]};
}

inline int64_t count_rows(const View& logits) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) n *= logits.sizes()[i];
  return n;
}

// Tensors must lie where the first one does: `given` all of them, `options` if they are not absent.
inline void on_one_device(const View& first, std::initializer_list<const View*> given, std::initializer_list<const View*> options) {
  const auto check = [&](const View& x) {
    require(x.device_type() == first.device_type() && x.device_index() == first.device_index(),
            "all tensors must be on one device");
  };
  for (const View* x : given) check(*x);
  for (const View* x : options)
    if (!absent(*x)) check(*x);
}

constexpr int64_t kMostRows = int64_t{1} << 56;   // the bytes of a state, less than 128 a row, are an int64

// The logits of a call and the shapes that follow from them.  `problem` lacks teacher_row, which is in the device's own hands.
class Call {
 public:
  Call(const View& student, const View* teacher, const View& labels, const View* rows, double temperature, int64_t ignore_index)
      : problem{},
        leading_dim_(student.dim() - 1),
        sizes_(student.sizes()),
        accumulator_(student.dtype() == dtypes().float64 ? dtypes().float64 : dtypes().float32) {
    problem.student = logits_of(student, student.data<void>());
    problem.rows = count_rows(student);
    problem.classes = sizes_[leading_dim_];
    require(problem.classes > 0, "there must be at least one class");
    require(problem.rows < kMostRows, "there must be fewer than 2^56 rows");
    require(temperature > 0 && std::isfinite(temperature), "temperature must be > 0 and finite");
    problem.temperature = temperature;
    problem.ignore_index = ignore_index;
    problem.with_labels = !absent(labels);
    if (problem.with_labels)
      problem.labels = static_cast<const int64_t*>(dense(labels, dtypes().int64, problem.rows, "labels must be int64, one a row"));
    if (!teacher || absent(*teacher)) return;
    problem.teacher = logits_of(*teacher, teacher->data<void>());
    problem.with_teacher = true;
    require(teacher->sizes()[teacher->dim() - 1] == problem.classes, "student and teacher must have the same number of classes");
    teacher_rows = count_rows(*teacher);
    rows_are_named = !absent(*rows);
    if (!rows_are_named)
      require(teacher_rows == problem.rows, "student and teacher must have the same number of rows");
    else
      named_rows =
          static_cast<const int64_t*>(dense(*rows, dtypes().int64, teacher_rows, "rows must be int64, one for each teacher row"));
  }

  Problem problem;
  int64_t teacher_rows = 0;
  bool rows_are_named = false;           // else a teacher's row belongs to the student's of the same number
  const int64_t* named_rows = nullptr;   // the student's row of each of the teacher's

  bool is_double() const { return accumulator_ == dtypes().float64; }
  int32_t accumulator() const { return accumulator_; }
  int64_t accumulator_bytes() const { return is_double() ? 8 : 4; }
  Tensor per_row(int32_t dtype, const View& like) const { return Tensor::empty(sizes_, leading_dim_, dtype, like); }
  Tensor like_student(const View& student) const { return Tensor::empty(sizes_, leading_dim_ + 1, student.dtype(), student); }

 private:
  int64_t leading_dim_;
  const int64_t* sizes_;
  int32_t accumulator_;
};

// ---- arguments.  The values in braces are taken in the order in which they stand.

// How many rows to keep: a fraction of them, or a number where that is not 0.
struct KeepOptions {
  double fraction;
  int64_t count;
  KeepOptions(double fraction, int64_t count) : fraction(fraction), count(count) {
    require(fraction > 0 && fraction <= 1 && count >= 0, "keep_fraction must lie in (0, 1], keep_count be 0 or more");
  }
  static KeepOptions of(Arguments& args) { return {args.real(), args.integer()}; }
};

// What the loss is made of beside the logits; the same for both directions.
struct LossOptions {
  double temperature, kd_weight, ce_weight;
  int64_t ignore_index;
  Reduction reduction;
  double ranks;   // processes whose rows `counts` counts

  LossOptions(double temperature, double kd_weight, double ce_weight, int64_t ignore_index, int64_t reduction, double ranks)
      : temperature(temperature),
        kd_weight(kd_weight),
        ce_weight(ce_weight),
        ignore_index(ignore_index),
        reduction(static_cast<Reduction>(reduction)),
        ranks(ranks) {
    require(reduction >= 0 && reduction <= static_cast<int64_t>(Reduction::none), "reduction must be 0 to 2");
  }
  static LossOptions of(Arguments& args) {
    return {args.real(), args.real(), args.real(), args.integer(), args.integer(), args.real()};
  }

  // What a sum over `count` rows is divided by; 0 for no rows, whose sum then counts 0.
  double divisor(int64_t count) const { return reduction == Reduction::mean ? static_cast<double>(count) / ranks : 1.0; }
};

inline const void* row_weight_of(const Call& call, const View& row_weight) {
  if (absent(row_weight)) return nullptr;
  return dense(row_weight, call.accumulator(), call.problem.rows, "row_weight must be of the accumulator's dtype, one a row");
}

// What rows are to be ranked by, checked.
inline void check_value(const Call& call, const View& score, Value value) {
  const Problem& p = call.problem;
  require(value >= Value::entropy && value <= Value::score, "value must be 0 to 4");
  require((value == Value::score) == !absent(score), "a score goes with value 4");
  require(value != Value::cross_entropy || p.with_labels, "the cross entropy needs labels");
  require(p.with_teacher || (value != Value::kl && value != Value::teacher_entropy), "this value needs a teacher");
  if (value == Value::score)
    dense(score, score.dtype() == dtypes().float64 ? dtypes().float64 : call.accumulator(), p.rows,
          "score must be of the accumulator's dtype or float64, one a row");
}

// ---- the state

// What rows are ranked by: of the scores' dtype, or the accumulator's.
inline bool ranks_by_double(const Call& call, const View& score) { return call.is_double() || score.dtype() == dtypes().float64; }

inline State state_of(const Call& call, bool value_is_double, void* data) {
  return {static_cast<char*>(data), call.problem.rows, value_is_double ? 8 : 4, call.accumulator_bytes()};
}

inline Tensor state_like(const Call& call, const View& score, const View& like) {
  return Tensor::empty({state_of(call, ranks_by_double(call, score), nullptr).bytes()}, dtypes().uint8, like);
}

// The state that an earlier call has left, checked.  It is read alone.
inline State given_state(const Call& call, const View& x) {
  constexpr const char* message = "state must come from the forward pass on the same logits";
  State state = state_of(call, call.is_double(), const_cast<void*>(x.data<void>()));
  if (x.numel() != state.bytes()) state.value_bytes = sizeof(double);
  dense(x, dtypes().uint8, state.bytes(), message);
  require(reinterpret_cast<uintptr_t>(state.data) % alignof(double) == 0, "state must be aligned to 8 bytes");
  return state;
}

struct ForwardCall {
  View student, teacher, labels, score, row_weight, rows;
  KeepOptions keep;
  Value value;
  LossOptions options;
  bool with_gradient;

  static ForwardCall of(Arguments& args) {
    return {args.tensor(),         args.tensor(), args.tensor(),         args.tensor(),
            args.tensor(),         args.tensor(), KeepOptions::of(args), static_cast<Value>(args.integer()),
            LossOptions::of(args), args.boolean()};
  }

  Call call() const {
    on_one_device(student, {}, {&teacher, &labels, &score, &row_weight, &rows});
    const Call call(student, &teacher, labels, &rows, options.temperature, options.ignore_index);
    require(call.problem.with_teacher, "teacher logits are missing");
    require(options.ce_weight == 0 || call.problem.with_labels, "ce_weight needs labels");
    check_value(call, score, value);
    row_weight_of(call, row_weight);
    require(!with_gradient || options.reduction != Reduction::none, "the gradient of the rows' losses needs their grad_output");
    return call;
  }
};

struct RowStatsCall {
  View student, teacher, labels, score, rows;
  double temperature;
  Value value;
  int64_t ignore_index;
  explicit RowStatsCall(Arguments& args)
      : student(args.tensor()),
        teacher(args.tensor()),
        labels(args.tensor()),
        score(args.tensor()),
        rows(args.tensor()),
        temperature(args.real()),
        value(static_cast<Value>(args.integer())),
        ignore_index(args.integer()) {}

  Call call() const {
    on_one_device(student, {}, {&teacher, &labels, &score, &rows});
    const Call call(student, &teacher, labels, &rows, temperature, ignore_index);
    check_value(call, score, value);
    return call;
  }
};

struct SelectCall {
  View value, candidate;
  KeepOptions keep;
  explicit SelectCall(Arguments& args) : value(args.tensor()), candidate(args.tensor()), keep(KeepOptions::of(args)) {
    on_one_device(value, {&candidate}, {});
    dense(value, is_double() ? dtypes().float64 : dtypes().float32, value.numel(), "value must be contiguous float32 or float64");
    dense(candidate, dtypes().boolean, value.numel(), "candidate must be contiguous bool, one a value");
  }
  bool is_double() const { return value.dtype() == dtypes().float64; }
};

struct ReduceCall {
  View student, labels, row_weight, state, cross_entropy;
  LossOptions options;
  explicit ReduceCall(Arguments& args)
      : student(args.tensor()),
        labels(args.tensor()),
        row_weight(args.tensor()),
        state(args.tensor()),
        cross_entropy(args.tensor()),
        options(LossOptions::of(args)) {}

  Call call() const {
    on_one_device(student, {&state}, {&labels, &row_weight, &cross_entropy});
    const Call call(student, nullptr, labels, nullptr, options.temperature, options.ignore_index);
    given_state(call, state);
    if (call.problem.with_labels)
      dense(cross_entropy, call.accumulator(), call.problem.rows, "cross_entropy must come from row_stats");
    require(options.ce_weight == 0 || call.problem.with_labels, "ce_weight needs labels");
    row_weight_of(call, row_weight);
    return call;
  }
};

struct BackwardCall {
  View grad_output, student, teacher, labels, row_weight, rows, state;
  LossOptions options;

  static constexpr size_t kStudent = 1;   // its place among the arguments
  static BackwardCall of(Arguments& args) {
    return {args.tensor(), args.tensor(), args.tensor(), args.tensor(),
            args.tensor(), args.tensor(), args.tensor(), LossOptions::of(args)};
  }

  bool one_for_all() const { return grad_output.dim() == 0; }

  Call call() const {
    on_one_device(student, {&grad_output, &state}, {&teacher, &labels, &row_weight, &rows});
    const Call call(student, &teacher, labels, &rows, options.temperature, options.ignore_index);
    require(call.problem.with_teacher, "teacher logits are missing");
    given_state(call, state);
    dense(grad_output, call.accumulator(), one_for_all() ? 1 : call.problem.rows,
          "grad_output must be of the accumulator's dtype, a scalar or one a row");
    row_weight_of(call, row_weight);
    return call;
  }
};

// ---- results

inline Tensor loss_like(const Call& call, const LossOptions& options, const View& student) {
  return options.reduction == Reduction::none ? call.per_row(call.accumulator(), student)
                                              : Tensor::empty({}, call.accumulator(), student);
}

inline Tensor cross_entropy_like(const Call& call, const View& student) {
  return call.problem.with_labels ? call.per_row(call.accumulator(), student) : Tensor::empty({0}, call.accumulator(), student);
}

// ---- operators

// The boxed kernels of one device.
using BoxedKernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);
struct OperatorKernels {
  BoxedKernel condensed_kd, condensed_kd_backward, condensed_kd_backward_, row_stats, select_topk, reduce_rows;
};
const OperatorKernels& cpu_operators();
const OperatorKernels& cuda_operators();

}   // namespace kcd
