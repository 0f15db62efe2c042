// The arguments of the operators on every device, read from the stack and checked, so that a wrong call through torch.ops cannot
// read out of bounds.  The contents of tensors are not checked here, since they may be in a device's memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <sstream>
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

inline bool is_floating(const View& x) {
  const int32_t dtype = x.dtype();
  return dtype == dtypes().float32 || dtype == dtypes().float64 || dtype == dtypes().float16 || dtype == dtypes().bfloat16;
}

// Schemas have no optional tensors: an empty bool tensor stands for an absent one.
inline bool is_absent(const View& x) { return x.dtype() == dtypes().boolean; }
inline View absent_view() {
  static const int64_t size = 0, stride = 1;
  return {nullptr, &size, &stride, 1, dtypes().boolean, 0, 0};
}

// Throws std::invalid_argument with the message, whose parts are written one after another, unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << "kcd_ext: " << ... << message);
  throw std::invalid_argument(text.str());
}

inline bool contiguous(const View& x) {
  int64_t step = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    if (x.sizes()[i] != 1 && x.strides()[i] != step) return false;
    step *= x.sizes()[i];
  }
  return true;
}

// Returns the data of a tensor that must be contiguous and have n elements.
inline const void* contiguous_data(const View& x, int32_t dtype, int64_t n, const char* message) {
  require(x.dtype() == dtype, message, "; got another dtype");
  require(x.numel() == n, message, "; got ", x.numel(), " elements instead of ", n);
  require(n == 0 || contiguous(x), message, "; got a tensor that is not contiguous");
  return x.data<void>();
}

// ---- shapes

// Describes (..., classes) as rows of contiguous classes with two strides.
inline Logits make_logits(const View& x, const void* data) {
  const int64_t dim = x.dim(), *sizes = x.sizes(), *strides = x.strides();
  require(dim >= 1, "logits must have shape (..., classes), got a scalar");
  if (x.numel() == 0) return {data, type_of(x), 1, 0, 0};
  require(sizes[dim - 1] <= 1 || strides[dim - 1] == 1, "the classes of a row must be contiguous, got stride ", strides[dim - 1]);
  // Merges the leading dimensions, innermost first, into at most two runs.  Within a run each stride is the previous dimension's
  // size times its stride.
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int run = -1;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (run >= 0 && strides[i] == size[run] * stride[run]) {
      size[run] *= sizes[i];
      continue;
    }
    require(++run < 2, "the rows of the logits must have at most two strides");
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

// Checks that all tensors are on the device of the first one.  Optional tensors may be absent.
inline void check_same_device(const View& first, std::initializer_list<const View*> tensors,
                              std::initializer_list<const View*> optional_tensors) {
  const auto check = [&](const View& x) {
    require(x.device_type() == first.device_type() && x.device_index() == first.device_index(),
            "all tensors must be on one device");
  };
  for (const View* x : tensors) check(*x);
  for (const View* x : optional_tensors)
    if (!is_absent(*x)) check(*x);
}

constexpr int64_t kMaxRows = int64_t{1} << 56;   // a state needs less than 128 bytes per row, so its size fits into an int64

// A checked call: its logits and the shapes that follow from them.  The device's subclass sets problem.teacher_row.
class Call {
 public:
  Call(const View& student, const View* teacher, const View& labels, const View* rows, double temperature, int64_t ignore_index,
       double label_smoothing)
      : problem{},
        leading_dim_(student.dim() - 1),
        sizes_(student.sizes()),
        accumulator_(student.dtype() == dtypes().float64 ? dtypes().float64 : dtypes().float32) {
    problem.student = make_logits(student, student.data<void>());
    problem.rows = count_rows(student);
    problem.classes = sizes_[leading_dim_];
    require(problem.classes > 0, "logits must have at least one class");
    require(problem.rows < kMaxRows, "logits must have fewer than 2^56 rows, got ", problem.rows);
    require(temperature > 0 && std::isfinite(temperature), "temperature must be > 0 and finite, got ", temperature);
    problem.temperature = temperature;
    problem.ignore_index = ignore_index;
    problem.with_labels = !is_absent(labels);
    require(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1], got ", label_smoothing);
    require(label_smoothing == 0 || problem.with_labels, "label_smoothing needs labels, got label_smoothing ", label_smoothing);
    problem.label_smoothing = label_smoothing;
    if (problem.with_labels) set_labels(labels);
    if (!teacher || is_absent(*teacher)) return;
    problem.teacher = make_logits(*teacher, teacher->data<void>());
    problem.with_teacher = true;
    const int64_t teacher_classes = teacher->sizes()[teacher->dim() - 1];
    require(teacher_classes == problem.classes, "student and teacher must have the same number of classes, got ", problem.classes,
            " and ", teacher_classes);
    teacher_rows = count_rows(*teacher);
    has_row_indices = !is_absent(*rows);
    if (!has_row_indices)
      require(teacher_rows == problem.rows, "student and teacher must have the same number of rows, got ", problem.rows, " and ",
              teacher_rows);
    else
      row_indices = static_cast<const int64_t*>(
          contiguous_data(*rows, dtypes().int64, teacher_rows, "rows must be int64 and contiguous, one per teacher row"));
  }

  Problem problem;
  int64_t teacher_rows = 0;
  bool has_row_indices = false;           // if false, teacher rows and student rows correspond one to one
  const int64_t* row_indices = nullptr;   // student row of each teacher row

  bool is_double() const { return accumulator_ == dtypes().float64; }
  int32_t accumulator() const { return accumulator_; }
  int64_t accumulator_bytes() const { return is_double() ? 8 : 4; }
  Tensor empty_per_row(int32_t dtype, const View& like) const { return Tensor::empty(sizes_, leading_dim_, dtype, like); }
  Tensor empty_like_student(const View& student) const { return Tensor::empty(sizes_, leading_dim_ + 1, student.dtype(), student); }

 private:
  void set_labels(const View& labels) {
    problem.soft_labels = is_floating(labels);
    if (!problem.soft_labels) {
      problem.labels = static_cast<const int64_t*>(
          contiguous_data(labels, dtypes().int64, problem.rows, "labels must be int64 and contiguous, one per row"));
      return;
    }
    problem.label_probabilities = make_logits(labels, labels.data<void>());
    require(count_rows(labels) == problem.rows && labels.sizes()[labels.dim() - 1] == problem.classes,
            "labels that are probabilities must have the student's rows and classes");
  }

  int64_t leading_dim_;
  const int64_t* sizes_;
  int32_t accumulator_;
};

// ---- arguments.  Braced initialisers evaluate in order, which is the order of the schema.

// How many rows to keep: `count` if it is not 0, else a fraction.
struct KeepOptions {
  double fraction;
  int64_t count;
  KeepOptions(double fraction, int64_t count) : fraction(fraction), count(count) {
    require(fraction > 0 && fraction <= 1, "keep_fraction must be in (0, 1], got ", fraction);
    require(count >= 0, "keep_count must be >= 0, got ", count);
  }
  static KeepOptions from(BoxedArguments& args) { return {args.real(), args.integer()}; }
};

// The options of the loss, for both directions.
struct LossOptions {
  double temperature, kd_weight, ce_weight, label_smoothing;
  int64_t ignore_index;
  Reduction reduction;
  double ranks;   // number of processes whose rows `counts` includes

  LossOptions(double temperature, double kd_weight, double ce_weight, double label_smoothing, int64_t ignore_index,
              int64_t reduction, double ranks)
      : temperature(temperature),
        kd_weight(kd_weight),
        ce_weight(ce_weight),
        label_smoothing(label_smoothing),
        ignore_index(ignore_index),
        reduction(static_cast<Reduction>(reduction)),
        ranks(ranks) {
    require(reduction >= 0 && reduction <= static_cast<int64_t>(Reduction::none), "reduction must be 0 to 2, got ", reduction);
  }
  static LossOptions from(BoxedArguments& args) {
    return {args.real(), args.real(), args.real(), args.real(), args.integer(), args.integer(), args.real()};
  }

  // The divisor of a sum over `count` rows.  0 if there are no rows; the term is then 0.
  double divisor(int64_t count) const { return reduction == Reduction::mean ? static_cast<double>(count) / ranks : 1.0; }
};

// Returns the data of row_weight, null if it is absent.
inline const void* check_row_weight(const Call& call, const View& row_weight) {
  if (is_absent(row_weight)) return nullptr;
  return contiguous_data(row_weight, call.accumulator(), call.problem.rows,
                         "row_weight must be contiguous in the accumulator's dtype, one per row");
}

inline void check_value(const Call& call, const View& score, Value value) {
  const Problem& p = call.problem;
  require(value >= Value::entropy && value <= Value::score, "value must be 0 to 4, got ", static_cast<int64_t>(value));
  require((value == Value::score) == !is_absent(score), "a score must be passed with value 4, and only then");
  require(value != Value::cross_entropy || p.with_labels, "value 3 (cross entropy) needs labels");
  require(p.with_teacher || (value != Value::kl && value != Value::teacher_entropy),
          "values 1 (teacher entropy) and 2 (KL) need a teacher");
  if (value == Value::score)
    contiguous_data(score, score.dtype() == dtypes().float64 ? dtypes().float64 : call.accumulator(), p.rows,
                    "score must be contiguous in the accumulator's dtype or float64, one per row");
}

// ---- the state

// Whether ranking values are double.  They have the scores' dtype or the accumulator's.
inline bool ranks_by_double(const Call& call, const View& score) { return call.is_double() || score.dtype() == dtypes().float64; }

inline State make_state(const Call& call, bool value_is_double, void* data) {
  return {static_cast<char*>(data), call.problem.rows, value_is_double ? 8 : 4, call.accumulator_bytes()};
}

inline Tensor empty_state(const Call& call, const View& score, const View& like) {
  return Tensor::empty({make_state(call, ranks_by_double(call, score), nullptr).bytes()}, dtypes().uint8, like);
}

// Checks a state from an earlier call, which is read-only.
inline State check_state(const Call& call, const View& x) {
  constexpr const char* message = "state must come from the forward pass on the same logits";
  State state = make_state(call, call.is_double(), const_cast<void*>(x.data<void>()));
  if (x.numel() != state.bytes()) state.value_bytes = sizeof(double);
  contiguous_data(x, dtypes().uint8, state.bytes(), message);
  require(reinterpret_cast<uintptr_t>(state.data) % alignof(double) == 0, "state must be aligned to 8 bytes");
  return state;
}

struct CondensedKDArguments {
  View student, teacher, labels, score, row_weight, rows;
  KeepOptions keep;
  Value value;
  LossOptions options;
  bool with_gradient;

  static CondensedKDArguments from(BoxedArguments& args) {
    return {args.tensor(),           args.tensor(), args.tensor(),           args.tensor(),
            args.tensor(),           args.tensor(), KeepOptions::from(args), static_cast<Value>(args.integer()),
            LossOptions::from(args), args.boolean()};
  }

  Call check() const {
    check_same_device(student, {}, {&teacher, &labels, &score, &row_weight, &rows});
    const Call call(student, &teacher, labels, &rows, options.temperature, options.ignore_index, options.label_smoothing);
    require(call.problem.with_teacher, "teacher logits are missing");
    require(options.ce_weight == 0 || call.problem.with_labels, "ce_weight needs labels, got ce_weight ", options.ce_weight);
    check_value(call, score, value);
    check_row_weight(call, row_weight);
    require(!with_gradient || options.reduction != Reduction::none, "with_gradient needs reduction mean or sum");
    return call;
  }
};

struct RowStatsArguments {
  View student, teacher, labels, score, rows;
  double temperature;
  Value value;
  int64_t ignore_index;
  double label_smoothing;
  explicit RowStatsArguments(BoxedArguments& args)
      : student(args.tensor()),
        teacher(args.tensor()),
        labels(args.tensor()),
        score(args.tensor()),
        rows(args.tensor()),
        temperature(args.real()),
        value(static_cast<Value>(args.integer())),
        ignore_index(args.integer()),
        label_smoothing(args.real()) {}

  Call check() const {
    check_same_device(student, {}, {&teacher, &labels, &score, &rows});
    const Call call(student, &teacher, labels, &rows, temperature, ignore_index, label_smoothing);
    check_value(call, score, value);
    return call;
  }
};

struct SelectTopkArguments {
  View value, candidate;
  KeepOptions keep;
  explicit SelectTopkArguments(BoxedArguments& args)
      : value(args.tensor()), candidate(args.tensor()), keep(KeepOptions::from(args)) {
    check_same_device(value, {&candidate}, {});
    contiguous_data(value, is_double() ? dtypes().float64 : dtypes().float32, value.numel(),
                    "value must be contiguous float32 or float64");
    contiguous_data(candidate, dtypes().boolean, value.numel(), "candidate must be contiguous bool, one per value");
  }
  bool is_double() const { return value.dtype() == dtypes().float64; }
};

struct ReduceRowsArguments {
  View student, labels, row_weight, state, cross_entropy;
  LossOptions options;
  explicit ReduceRowsArguments(BoxedArguments& args)
      : student(args.tensor()),
        labels(args.tensor()),
        row_weight(args.tensor()),
        state(args.tensor()),
        cross_entropy(args.tensor()),
        options(LossOptions::from(args)) {}

  Call check() const {
    check_same_device(student, {&state}, {&labels, &row_weight, &cross_entropy});
    const Call call(student, nullptr, labels, nullptr, options.temperature, options.ignore_index, options.label_smoothing);
    check_state(call, state);
    if (call.problem.with_labels)
      contiguous_data(cross_entropy, call.accumulator(), call.problem.rows, "cross_entropy must come from row_stats");
    require(options.ce_weight == 0 || call.problem.with_labels, "ce_weight needs labels, got ce_weight ", options.ce_weight);
    check_row_weight(call, row_weight);
    return call;
  }
};

struct CondensedKDBackwardArguments {
  View grad_output, student, teacher, labels, row_weight, rows, state;
  LossOptions options;

  static constexpr size_t kStudent = 1;   // index in the schema
  static CondensedKDBackwardArguments from(BoxedArguments& args) {
    return {args.tensor(), args.tensor(), args.tensor(), args.tensor(),
            args.tensor(), args.tensor(), args.tensor(), LossOptions::from(args)};
  }

  bool has_scalar_grad_output() const { return grad_output.dim() == 0; }

  Call check() const {
    check_same_device(student, {&grad_output, &state}, {&teacher, &labels, &row_weight, &rows});
    const Call call(student, &teacher, labels, &rows, options.temperature, options.ignore_index, options.label_smoothing);
    require(call.problem.with_teacher, "teacher logits are missing");
    check_state(call, state);
    contiguous_data(grad_output, call.accumulator(), has_scalar_grad_output() ? 1 : call.problem.rows,
                    "grad_output must be contiguous in the accumulator's dtype, a scalar or one per row");
    check_row_weight(call, row_weight);
    return call;
  }
};

// ---- results

inline Tensor empty_loss(const Call& call, const LossOptions& options, const View& student) {
  return options.reduction == Reduction::none ? call.empty_per_row(call.accumulator(), student)
                                              : Tensor::empty({}, call.accumulator(), student);
}

inline Tensor empty_cross_entropy(const Call& call, const View& student) {
  return call.problem.with_labels ? call.empty_per_row(call.accumulator(), student)
                                  : Tensor::empty({0}, call.accumulator(), student);
}

// ---- operators

// The boxed kernels of a device.
using BoxedKernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);
struct OperatorKernels {
  BoxedKernel condensed_kd, condensed_kd_backward, condensed_kd_backward_, row_stats, select_topk, reduce_rows;
};
const OperatorKernels& cpu_operators();
const OperatorKernels& cuda_operators();

}   // namespace kcd
