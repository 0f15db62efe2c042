// The operators torch.ops.kcd_ext.*, registered with torch's dispatcher.  Boxed kernels: arguments come as owned handles on a
// stack, results replace them.  A tensor that is absent is an empty one of dtype bool.
#include "torch/ops.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu/reduce.h"
#include "kernels.h"
#include "torch/abi.h"

namespace kcd {
namespace {

using cpu::Reduction;
using cpu::Value;

struct Dtypes {
  int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(), float16 = aoti_torch_dtype_float16(),
          bfloat16 = aoti_torch_dtype_bfloat16(), int64 = aoti_torch_dtype_int64(), boolean = aoti_torch_dtype_bool();
};
const Dtypes& dtypes() {
  static const Dtypes all;
  return all;
}

Type type_of(const Tensor& logits) {
  const int32_t dtype = logits.dtype();
  if (dtype == dtypes().float32) return Type::float32;
  if (dtype == dtypes().float64) return Type::float64;
  if (dtype == dtypes().float16) return Type::float16;
  if (dtype == dtypes().bfloat16) return Type::bfloat16;
  throw std::invalid_argument("kcd_ext: logits must be float32, float64, float16 or bfloat16");
}

bool absent(const Tensor& x) { return x.dtype() == dtypes().boolean; }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(std::string("kcd_ext: ") + message);
}

bool contiguous(const Tensor& x) {
  int64_t step = 1;
  for (int64_t i = x.dim() - 1; i >= 0; --i) {
    if (x.sizes()[i] != 1 && x.strides()[i] != step) return false;
    step *= x.sizes()[i];
  }
  return true;
}

// The numbers of a tensor that must hold n of them, side by side.
const void* dense(const Tensor& x, int32_t dtype, int64_t n, const char* message) {
  require(x.dtype() == dtype && x.numel() == n && (n == 0 || contiguous(x)), message);
  return x.data<void>();
}

// ---- shapes

// (..., classes) as rows of contiguous classes at two strides.
Logits logits_of(const Tensor& x, const void* data) {
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

int64_t count_rows(const Tensor& logits) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) n *= logits.sizes()[i];
  return n;
}

// What the operators that read logits have in common, checked: a wrong call through torch.ops must not read out of bounds.
class Call {
 public:
  Call(const Tensor& student, const Tensor* teacher, const Tensor& labels, const Tensor* rows, double temperature,
       int64_t ignore_index)
      : leading_dim_(student.dim() - 1),
        sizes_(student.sizes()),
        accumulator_(student.dtype() == dtypes().float64 ? dtypes().float64 : dtypes().float32) {
    problem.student = logits_of(student, student.data<void>());
    problem.rows = count_rows(student);
    problem.classes = sizes_[leading_dim_];
    require(problem.classes > 0, "there must be at least one class");
    require(temperature > 0 && std::isfinite(temperature), "temperature must be > 0 and finite");
    problem.temperature = temperature;
    problem.ignore_index = ignore_index;
    problem.with_labels = !absent(labels);
    problem.labels = nullptr;
    problem.teacher_row = nullptr;
    problem.teacher = {};
    problem.with_teacher = false;
    if (problem.with_labels) {
      problem.labels = static_cast<const int64_t*>(dense(labels, dtypes().int64, problem.rows, "labels must be int64, one a row"));
      check_labels();
    }
    if (!teacher || absent(*teacher)) return;
    problem.teacher = logits_of(*teacher, teacher->data<void>());
    problem.with_teacher = true;
    require(teacher->sizes()[teacher->dim() - 1] == problem.classes, "student and teacher must have the same number of classes");
    if (absent(*rows)) {
      require(count_rows(*teacher) == problem.rows, "student and teacher must have the same number of rows");
    } else {
      const int64_t n = count_rows(*teacher);
      map_teacher_rows(static_cast<const int64_t*>(dense(*rows, dtypes().int64, n, "rows must be int64, one for each teacher row")),
                       n);
    }
  }

  Problem problem;

  bool is_double() const { return accumulator_ == dtypes().float64; }
  int32_t accumulator() const { return accumulator_; }
  Tensor per_row(int32_t dtype, const Tensor& like) const { return Tensor::empty(sizes_, leading_dim_, dtype, like); }
  Tensor like_student(const Tensor& student) const { return Tensor::empty(sizes_, leading_dim_ + 1, student.dtype(), student); }

  // Runs a kernel over the rows on torch's threads; a piece of work is worth about 10 us.
  template <class Body>
  void over_rows(const Body& body) const {
    constexpr int64_t kLogitsAPiece = 32768;
    const int64_t grain = std::max<int64_t>(1, kLogitsAPiece / problem.classes);
    problem.rows <= grain ? body(int64_t{0}, problem.rows) : parallel_for(problem.rows, grain, body);
  }

 private:
  void check_labels() const {
    for (int64_t i = 0; i < problem.rows; ++i) {
      const int64_t label = problem.labels[i];
      if ((label < 0 || label >= problem.classes) && label != problem.ignore_index)
        throw std::out_of_range("labels[" + std::to_string(i) + "] is " + std::to_string(label) + ": it must lie in [0, " +
                                std::to_string(problem.classes) + ") or be ignore_index " + std::to_string(problem.ignore_index));
    }
  }

  // rows[j] = i: the teacher's row j is the student's row i.
  void map_teacher_rows(const int64_t* rows, int64_t n) {
    teacher_row_.assign(static_cast<size_t>(problem.rows), -1);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t i = rows[j];
      if (i == -1) continue;
      if (i < -1 || i >= problem.rows)
        throw std::out_of_range("rows[" + std::to_string(j) + "] is " + std::to_string(i) + ": it must lie in [0, " +
                                std::to_string(problem.rows) + "), or be -1 to be skipped");
      if (teacher_row_[i] >= 0) throw std::invalid_argument("rows names row " + std::to_string(i) + " more than once");
      teacher_row_[i] = j;
    }
    problem.teacher_row = teacher_row_.data();   // not moved when the Call is
  }

  int64_t leading_dim_;
  const int64_t* sizes_;
  int32_t accumulator_;
  std::vector<int64_t> teacher_row_;
};

// ---- rows: what one read of the logits gives

// Room for one number a row, of either type, that no operator returns.
using Scratch = std::vector<double>;

struct Rows {
  Tensor value, stats;   // what rows are ranked by, (...); (kStatsRows, rows)
  const void* cross_entropy;
};

template <class Score>
void rank(const Call& call, const Score* value, const Rows& rows, const uint8_t* candidate) {
  const Problem& p = call.problem;
  Score* ranked = rows.value.mutable_data<Score>();
  if (call.is_double()) {
    const double* stats = rows.stats.data<double>();
    cpu::rank(value, stats + kEntropy * p.rows, stats + kKl * p.rows, p.with_teacher, candidate, p.rows, ranked);
  } else {
    const float* stats = rows.stats.data<float>();
    cpu::rank(value, stats + kEntropy * p.rows, stats + kKl * p.rows, p.with_teacher, candidate, p.rows, ranked);
  }
}

// cross_entropy: where to write it; not null where there are labels.
Rows read_rows(const Call& call, const Tensor& student, const Tensor& score, Value value, void* cross_entropy,
               const uint8_t* candidate) {
  const Problem& p = call.problem;
  const int32_t accumulator = call.accumulator();
  require(value >= Value::entropy && value <= Value::score, "value must be 0 to 4");
  require((value == Value::score) == !absent(score), "a score goes with value 4");
  require(value != Value::cross_entropy || p.with_labels, "the cross entropy needs labels");
  require(p.with_teacher || (value != Value::kl && value != Value::teacher_entropy), "this value needs a teacher");
  const bool score_is_double = score.dtype() == dtypes().float64;
  if (value == Value::score)
    dense(score, score_is_double ? dtypes().float64 : dtypes().float32, p.rows, "score must be float32 or float64, one a row");

  Rows rows{call.per_row(value == Value::score ? score.dtype() : accumulator, student),
            Tensor::empty({kStatsRows, p.rows}, accumulator, student), cross_entropy};
  // The teacher's entropy only ranks: it is written where the ranking is read from.
  const bool by_teacher_entropy = value == Value::teacher_entropy;
  const RowOutputs outputs{rows.stats.mutable_data<void>(), cross_entropy,
                           by_teacher_entropy ? rows.value.mutable_data<void>() : nullptr};
  call.over_rows([&](int64_t begin, int64_t end) { cpu::kernels().forward(p, outputs, begin, end); });

  const char* stats = rows.stats.data<char>();
  const int64_t stats_row = p.rows * (call.is_double() ? 8 : 4);
  const void* source = value == Value::score           ? score.data<void>()
                       : value == Value::kl            ? stats + kKl * stats_row
                       : value == Value::cross_entropy ? cross_entropy
                       : by_teacher_entropy            ? rows.value.data<void>()
                                                       : stats + kEntropy * stats_row;
  rows.value.dtype() == dtypes().float64 ? rank(call, static_cast<const double*>(source), rows, candidate)
                                         : rank(call, static_cast<const float*>(source), rows, candidate);
  return rows;
}

void select(const Tensor& value, const uint8_t* candidate, int64_t k, const Tensor& selected) {
  uint8_t* out = selected.mutable_data<uint8_t>();
  value.dtype() == dtypes().float64 ? cpu::select(value.data<double>(), candidate, value.numel(), k, out)
                                    : cpu::select(value.data<float>(), candidate, value.numel(), k, out);
}

// ---- loss

// What the loss is made of beside the logits; the same for both directions.
struct LossOptions {
  double temperature, kd_weight, ce_weight;
  int64_t ignore_index;
  Reduction reduction;
  double ranks;   // processes whose rows `counts` counts

  explicit LossOptions(Arguments& args)
      : temperature(args.real()),
        kd_weight(args.real()),
        ce_weight(args.real()),
        ignore_index(args.integer()),
        reduction(static_cast<Reduction>(args.integer())),
        ranks(args.real()) {
    require(reduction >= Reduction::mean && reduction <= Reduction::none, "reduction must be 0 to 2");
  }

  // What a sum over `count` rows is divided by; 0 for no rows, whose sum then counts 0.
  double divisor(int64_t count) const { return reduction == Reduction::mean ? static_cast<double>(count) / ranks : 1.0; }
};

const void* row_weight_of(const Call& call, const Tensor& row_weight) {
  if (absent(row_weight)) return nullptr;
  return dense(row_weight, call.accumulator(), call.problem.rows, "row_weight must be of the accumulator's dtype, one a row");
}

// counts: how many rows are selected, how many are valid.
template <class Real>
void reduce(const Call& call, const LossOptions& options, const Tensor& row_weight, const Tensor& selected, const Tensor& stats,
            const void* cross_entropy, const int64_t* counts, const Tensor& loss) {
  const cpu::LossFactors factors{options.kd_weight * options.temperature * options.temperature, options.ce_weight,
                                 options.divisor(counts[0]), options.divisor(counts[1]), options.reduction};
  cpu::loss(call.problem, stats.data<Real>() + kKl * call.problem.rows, static_cast<const Real*>(cross_entropy),
            static_cast<const Real*>(row_weight_of(call, row_weight)), selected.data<uint8_t>(), factors,
            loss.mutable_data<Real>());
}

Tensor reduce(const Call& call, const LossOptions& options, const Tensor& student, const Tensor& row_weight, const Tensor& selected,
              const Tensor& stats, const void* cross_entropy, const int64_t* counts) {
  require(options.ce_weight == 0 || call.problem.with_labels, "ce_weight needs labels");
  Tensor loss = options.reduction == Reduction::none ? call.per_row(call.accumulator(), student)
                                                     : Tensor::empty({}, call.accumulator(), student);
  call.is_double() ? reduce<double>(call, options, row_weight, selected, stats, cross_entropy, counts, loss)
                   : reduce<float>(call, options, row_weight, selected, stats, cross_entropy, counts, loss);
  return loss;
}

void check_rows_of(const Call& call, const Tensor& selected, const Tensor& stats, const Tensor& counts) {
  constexpr const char* message = "selected, stats and counts must come from the forward pass on the same logits";
  dense(selected, dtypes().boolean, call.problem.rows, message);
  dense(stats, call.accumulator(), kStatsRows * call.problem.rows, message);
  dense(counts, dtypes().int64, 2, message);
}

// max(1, int(fraction * n)), or min(count, n) where count > 0; 0 of none.
int64_t number_to_keep(double fraction, int64_t count, int64_t n) {
  require(fraction > 0 && fraction <= 1 && count >= 0, "keep_fraction must lie in (0, 1], keep_count be 0 or more");
  if (n == 0) return 0;
  if (count > 0) return std::min(count, n);
  return std::max<int64_t>(1, static_cast<int64_t>(fraction * static_cast<double>(n)));
}

// ---- the operators

void condensed_kd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor student = args.tensor(), teacher = args.tensor(), labels = args.tensor(), score = args.tensor(),
               row_weight = args.tensor(), teacher_rows = args.tensor();
  const double keep_fraction = args.real();
  const int64_t keep_count = args.integer();
  const auto value = static_cast<Value>(args.integer());
  const LossOptions options(args);

  const Call call(student, &teacher, labels, &teacher_rows, options.temperature, options.ignore_index);
  const Problem& p = call.problem;
  require(p.with_teacher, "teacher logits are missing");
  std::vector<uint8_t> candidate(static_cast<size_t>(p.rows));
  Tensor counts = Tensor::empty({2}, dtypes().int64, student);
  int64_t* count = counts.mutable_data<int64_t>();
  count[0] = number_to_keep(keep_fraction, keep_count, cpu::mark_candidates(p, candidate.data()));
  count[1] = cpu::count_valid(p);

  Scratch cross_entropy(p.with_labels ? static_cast<size_t>(p.rows) : 0);
  Rows rows = read_rows(call, student, score, value, p.with_labels ? cross_entropy.data() : nullptr, candidate.data());
  Tensor selected = call.per_row(dtypes().boolean, student);
  select(rows.value, candidate.data(), count[0], selected);
  Tensor loss = reduce(call, options, student, row_weight, selected, rows.stats, rows.cross_entropy, count);
  give_back(stack, loss, rows.value, rows.stats, selected, counts);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor student = args.tensor(), teacher = args.tensor(), labels = args.tensor(), score = args.tensor(),
               teacher_rows = args.tensor();
  const double temperature = args.real();
  const auto value = static_cast<Value>(args.integer());
  const int64_t ignore_index = args.integer();

  const Call call(student, &teacher, labels, &teacher_rows, temperature, ignore_index);
  const bool with_labels = call.problem.with_labels;
  Tensor candidate = call.per_row(dtypes().boolean, student);
  cpu::mark_candidates(call.problem, candidate.mutable_data<uint8_t>());
  Tensor cross_entropy = with_labels ? call.per_row(call.accumulator(), student) : Tensor::empty({0}, call.accumulator(), student);
  Rows rows =
      read_rows(call, student, score, value, with_labels ? cross_entropy.mutable_data<void>() : nullptr, candidate.data<uint8_t>());
  give_back(stack, rows.value, rows.stats, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor value = args.tensor(), candidate = args.tensor();
  const double keep_fraction = args.real();
  const int64_t keep_count = args.integer();
  const int32_t dtype = value.dtype() == dtypes().float64 ? dtypes().float64 : dtypes().float32;
  dense(value, dtype, value.numel(), "value must be contiguous float32 or float64");
  const auto* candidates = static_cast<const uint8_t*>(
      dense(candidate, dtypes().boolean, value.numel(), "candidate must be contiguous bool, one a value"));
  const int64_t n = std::count(candidates, candidates + value.numel(), uint8_t{1});
  Tensor selected = Tensor::empty(value.sizes(), value.dim(), dtypes().boolean, value);
  select(value, candidates, number_to_keep(keep_fraction, keep_count, n), selected);
  give_back(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments args(stack);
  const Tensor student = args.tensor(), labels = args.tensor(), row_weight = args.tensor(), selected = args.tensor(),
               stats = args.tensor(), cross_entropy = args.tensor(), counts = args.tensor();
  const LossOptions options(args);
  const Call call(student, nullptr, labels, nullptr, options.temperature, options.ignore_index);
  check_rows_of(call, selected, stats, counts);
  if (call.problem.with_labels)
    dense(cross_entropy, call.accumulator(), call.problem.rows, "cross_entropy must come from row_stats");
  Tensor loss = reduce(call, options, student, row_weight, selected, stats, cross_entropy.data<void>(), counts.data<int64_t>());
  give_back(stack, loss);
}

struct BackwardArguments {
  Tensor grad_output, student, teacher, labels, row_weight, teacher_rows, selected, stats, counts;
  LossOptions options;
  explicit BackwardArguments(Arguments args)
      : grad_output(args.tensor()),
        student(args.tensor()),
        teacher(args.tensor()),
        labels(args.tensor()),
        row_weight(args.tensor()),
        teacher_rows(args.tensor()),
        selected(args.tensor()),
        stats(args.tensor()),
        counts(args.tensor()),
        options(args) {}

  Call call() const { return Call(student, &teacher, labels, &teacher_rows, options.temperature, options.ignore_index); }
};

void write_gradient(const Call& call, const BackwardArguments& a, const Logits& out) {
  const Problem& p = call.problem;
  check_rows_of(call, a.selected, a.stats, a.counts);
  const bool one_for_all = a.grad_output.dim() == 0;
  dense(a.grad_output, call.accumulator(), one_for_all ? 1 : p.rows,
        "grad_output must be of the accumulator's dtype, a scalar or one a row");
  const auto* selected = a.selected.data<uint8_t>();
  for (int64_t i = 0; i < p.rows; ++i)
    require(!selected[i] || p.teacher_row_of(i) >= 0, "selected names a row that the teacher does not hold");
  // A gradient that no cache holds is written past them: the lines it would push out are not fetched first, and stay.
  constexpr int64_t kStreamingBytes = int64_t{8} << 20;
  const bool streaming = out.data != p.student.data && p.rows * p.classes * size_of(p.student.type) >= kStreamingBytes;
  const int64_t* counts = a.counts.data<int64_t>();
  const auto share = [](double factor, double divisor) { return divisor > 0 ? factor / divisor : 0.0; };
  const Gradient gradient{a.stats.data<void>(),
                          selected,
                          row_weight_of(call, a.row_weight),
                          a.grad_output.data<void>(),
                          one_for_all ? 0 : 1,
                          share(a.options.kd_weight * a.options.temperature, a.options.divisor(counts[0])),
                          share(a.options.ce_weight, a.options.divisor(counts[1])),
                          out,
                          streaming};
  call.over_rows([&](int64_t begin, int64_t end) { cpu::kernels().backward(p, gradient, begin, end); });
}

void condensed_kd_backward(StableIValue* stack, uint64_t, uint64_t) {
  const BackwardArguments a{Arguments(stack)};
  const Call call = a.call();
  Tensor out = call.like_student(a.student);
  write_gradient(call, a, logits_of(out, out.mutable_data<void>()));
  give_back(stack, out);
}

void condensed_kd_gradient_(StableIValue* stack, uint64_t, uint64_t) {
  const BackwardArguments a{Arguments(stack)};
  write_gradient(a.call(), a, logits_of(a.student, a.student.mutable_data<void>()));
}

#define KCD_LOSS_OPTIONS "float temperature, float kd_weight, float ce_weight, int ignore_index, int reduction, float ranks"
#define KCD_FORWARD_SCHEMA                                                                                              \
  "(Tensor student, Tensor teacher, Tensor labels, Tensor score, Tensor row_weight, Tensor rows, float keep_fraction, " \
  "int keep_count, int value, " KCD_LOSS_OPTIONS ") -> (Tensor loss, Tensor value, Tensor stats, Tensor selected, Tensor counts)"
#define KCD_BACKWARD_SCHEMA(student, result)                                                   \
  "(Tensor grad_output, " student                                                              \
  " student, Tensor teacher, Tensor labels, Tensor row_weight, Tensor rows, Tensor selected, " \
  "Tensor stats, Tensor counts, " KCD_LOSS_OPTIONS ") -> " result

// name, kernel, schema.  Each direction has two names: condensed_kd and condensed_kd_backward carry the derivatives that
// kcd_ext/ops.py registers, for torch.compile and for whoever calls torch.ops.kcd_ext himself; condensed_kd_forward and
// condensed_kd_gradient carry none, and spare the eager path the Python in which torch.library wraps a derivative.
#define KCD_OPERATORS(X)                                                                                                  \
  X(condensed_kd, condensed_kd, KCD_FORWARD_SCHEMA)                                                                       \
  X(condensed_kd_forward, condensed_kd, KCD_FORWARD_SCHEMA)                                                               \
  X(condensed_kd_backward, condensed_kd_backward, KCD_BACKWARD_SCHEMA("Tensor", "Tensor gradient"))                       \
  X(condensed_kd_gradient, condensed_kd_backward, KCD_BACKWARD_SCHEMA("Tensor", "Tensor gradient"))                       \
  X(condensed_kd_gradient_, condensed_kd_gradient_, KCD_BACKWARD_SCHEMA("Tensor(a!)", "()"))                              \
  X(row_stats, row_stats,                                                                                                 \
    "(Tensor student, Tensor teacher, Tensor labels, Tensor score, Tensor rows, float temperature, int value, "           \
    "int ignore_index) -> (Tensor value, Tensor stats, Tensor cross_entropy, Tensor candidate)")                          \
  X(select_topk, select_topk, "(Tensor value, Tensor candidate, float keep_fraction, int keep_count) -> Tensor selected") \
  X(reduce_rows, reduce_rows,                                                                                             \
    "(Tensor student, Tensor labels, Tensor row_weight, Tensor selected, Tensor stats, Tensor cross_entropy, "            \
    "Tensor counts, " KCD_LOSS_OPTIONS ") -> Tensor loss")

}   // namespace

void register_operators() {
  cpu::kernels();   // a wrong KCD_ISA is reported now
  TorchLibraryHandle library, cpu;
  if (aoti_torch_library_init_def("kcd_ext", __FILE__, __LINE__, &library) != 0)
    throw std::runtime_error("another copy of kcd_ext's extension is already loaded in this process: import only one of them");
#define X(name, kernel, schema) KCD_CALL(aoti_torch_library_def, library, #name schema);
  KCD_OPERATORS(X)
#undef X
  KCD_CALL(aoti_torch_library_init_impl, "kcd_ext", "CPU", __FILE__, __LINE__, &cpu);
#define X(name, kernel, schema) KCD_CALL(torch_library_impl, cpu, #name, kernel, kTorchVersion);
  KCD_OPERATORS(X)
#undef X
  // The handles are never given back: the registrations live as long as the process.
}

const std::string& build_info_json() {
  static const std::string info = [] {
    std::string sets;
    for (const char* const* name = cpu::built_sets(); *name; ++name)
      sets += (sets.empty() ? "\"" : ", \"") + std::string(*name) + "\"";
    return std::string("{\"version\": \"") + KCD_VERSION + "\", \"compiler\": \"" + KCD_COMPILER + "\", \"instruction_sets\": [" +
           sets + "], \"instruction_set_in_use\": \"" + cpu::kernels().name + "\", \"cuda_architectures\": []}";
  }();
  return info;
}

}   // namespace kcd
