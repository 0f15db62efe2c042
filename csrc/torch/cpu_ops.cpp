// The operators on the CPU: O(rows) bookkeeping here, logits in the kernels of csrc/cpu.
#include <vector>

#include "cpu/buffer.h"
#include "cpu/reduce.h"
#include "torch/call.h"

namespace kcd {
namespace {

// A call whose labels and rows have been looked at.
class CpuCall : public Call {
 public:
  explicit CpuCall(Call call) : Call(call) {
    if (problem.with_labels) check_labels();
    if (rows_are_named) map_teacher_rows();
  }

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

  // named_rows[j] = i: the teacher's row j is the student's row i.
  void map_teacher_rows() {
    teacher_row_.assign(static_cast<size_t>(problem.rows), -1);
    for (int64_t j = 0; j < teacher_rows; ++j) {
      const int64_t i = named_rows[j];
      if (i == -1) continue;
      if (i < -1 || i >= problem.rows)
        throw std::out_of_range("rows[" + std::to_string(j) + "] is " + std::to_string(i) + ": it must lie in [0, " +
                                std::to_string(problem.rows) + "), or be -1 to be skipped");
      if (teacher_row_[i] >= 0) throw std::invalid_argument("rows names row " + std::to_string(i) + " more than once");
      teacher_row_[i] = j;
    }
    problem.teacher_row = teacher_row_.data();
  }

  std::vector<int64_t> teacher_row_;   // a move leaves its numbers where they are
};

// ---- rows: what one read of the logits gives

struct Rows {
  Tensor value, stats;   // what rows are ranked by, (...); (kStatsRows, rows)
};

template <class Score>
void rank(const CpuCall& call, const Score* value, const Rows& rows, const uint8_t* candidate) {
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
Rows read_rows(const CpuCall& call, const Tensor& student, const Tensor& score, Value value, void* cross_entropy,
               const uint8_t* candidate, const Gradient* gradient = nullptr) {
  const Problem& p = call.problem;
  Rows rows{ranked_like(call, score, student), stats_like(call, student)};
  // The teacher's entropy only ranks: it is written where the ranking is read from.
  const bool by_teacher_entropy = value == Value::teacher_entropy;
  const RowOutputs outputs{rows.stats.mutable_data<void>(), cross_entropy,
                           by_teacher_entropy ? rows.value.mutable_data<void>() : nullptr};
  call.over_rows([&](int64_t begin, int64_t end) { cpu::kernels().forward(p, outputs, gradient, begin, end); });

  const char* stats = rows.stats.data<char>();
  const int64_t stats_row = p.rows * call.accumulator_bytes();
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

// counts: how many rows are selected, how many are valid.
template <class Real>
void reduce(const Call& call, const LossOptions& options, const Tensor& row_weight, const Tensor& selected, const Tensor& stats,
            const void* cross_entropy, const int64_t* counts, const Tensor& loss) {
  const LossFactors factors{options.kd_weight * options.temperature * options.temperature, options.ce_weight,
                            options.divisor(counts[0]), options.divisor(counts[1])};
  cpu::loss(call.problem, stats.data<Real>() + kKl * call.problem.rows, static_cast<const Real*>(cross_entropy),
            static_cast<const Real*>(row_weight_of(call, row_weight)), selected.data<uint8_t>(), factors, options.reduction,
            loss.mutable_data<Real>());
}

Tensor reduce(const Call& call, const LossOptions& options, const Tensor& student, const Tensor& row_weight, const Tensor& selected,
              const Tensor& stats, const void* cross_entropy, const int64_t* counts) {
  Tensor loss = loss_like(call, options, student);
  call.is_double() ? reduce<double>(call, options, row_weight, selected, stats, cross_entropy, counts, loss)
                   : reduce<float>(call, options, row_weight, selected, stats, cross_entropy, counts, loss);
  return loss;
}

// ---- the operators

// A gradient's memory: torch's or, where it is large, the one that the last gradient left.
Tensor gradient_like(const Call& call, const Tensor& student) {
  const size_t bytes = static_cast<size_t>(call.problem.rows * call.problem.classes * size_of(call.problem.student.type));
  if (bytes < cpu::kLargeBytes || !Tensor::can_be_over_memory() || cpu::gradient_memory() == cpu::Memory::torch)
    return call.like_student(student);
  const cpu::Buffer buffer = cpu::take_buffer(bytes);
  const auto give_back = [](void* data, void* size) { cpu::give_back_buffer({data, reinterpret_cast<size_t>(size)}); };
  return Tensor::over(buffer.data, student.sizes(), student.dim(), student.dtype(), student, give_back,
                      reinterpret_cast<void*>(buffer.bytes));
}

double share(double factor, double divisor) { return divisor > 0 ? factor / divisor : 0.0; }

// A gradient that no cache holds is written past them: the lines it would push out are not fetched first, and stay.
bool streams(const Problem& p) {
  constexpr int64_t kStreamingBytes = int64_t{8} << 20;
  return p.rows * p.classes * size_of(p.student.type) >= kStreamingBytes;
}

Gradient gradient_of(const Call& call, const LossOptions& options, const Tensor& row_weight, const int64_t* counts,
                     const Logits& out) {
  Gradient gradient{};
  gradient.row_weight = row_weight_of(call, row_weight);
  gradient.kd_factor = share(options.kd_weight * options.temperature, options.divisor(counts[0]));
  gradient.ce_factor = share(options.ce_weight, options.divisor(counts[1]));
  gradient.out = out;
  gradient.streaming = out.data != call.problem.student.data && streams(call.problem);
  return gradient;
}

void write_rows(const CpuCall& call, const Gradient& gradient) {
  call.over_rows([&](int64_t begin, int64_t end) { cpu::kernels().backward(call.problem, gradient, begin, end); });
}

// What the operator gives.  `out`: where the gradient of the loss goes as well; null: nowhere.
struct Forward {
  Tensor loss, value, stats, selected, counts;
};

Forward forward(const ForwardCall& a, const CpuCall& call, const Tensor* out) {
  const Problem& p = call.problem;
  std::vector<uint8_t> candidate(static_cast<size_t>(p.rows));
  Tensor counts = Tensor::empty({2}, dtypes().int64, a.student);
  int64_t* count = counts.mutable_data<int64_t>();
  count[0] = number_to_keep(a.keep.fraction, a.keep.count, cpu::mark_candidates(p, candidate.data()));
  count[1] = cpu::count_valid(p);

  std::vector<double> cross_entropy(p.with_labels ? static_cast<size_t>(p.rows) : 0);   // room for either type
  void* cross_entropies = p.with_labels ? cross_entropy.data() : nullptr;
  std::vector<uint8_t> written(out ? static_cast<size_t>(p.rows) : 0);
  Gradient gradient{};
  if (out) {
    gradient = gradient_of(call, a.options, a.row_weight, count, logits_of(*out, out->mutable_data<void>()));
    gradient.written = written.data();
  }
  Rows rows = read_rows(call, a.student, a.score, a.value, cross_entropies, candidate.data(), out ? &gradient : nullptr);
  Tensor selected = call.per_row(dtypes().boolean, a.student);
  select(rows.value, candidate.data(), count[0], selected);
  if (out) {
    gradient.stats = rows.stats.data<void>();
    gradient.selected = selected.data<uint8_t>();
    write_rows(call, gradient);
  }
  Tensor loss = reduce(call, a.options, a.student, a.row_weight, selected, rows.stats, cross_entropies, count);
  return {std::move(loss), std::move(rows.value), std::move(rows.stats), std::move(selected), std::move(counts)};
}

void condensed_kd(StableIValue* stack, uint64_t, uint64_t) {
  const ForwardCall a{Arguments(stack)};
  Forward f = forward(a, CpuCall(a.call()), nullptr);
  give_back(stack, f.loss, f.value, f.stats, f.selected, f.counts);
}

void condensed_kd_with_gradient(StableIValue* stack, uint64_t, uint64_t) {
  const ForwardCall a{Arguments(stack)};
  const CpuCall call(a.call());
  require(a.options.reduction != Reduction::none, "the gradient of the rows' losses needs their grad_output");
  Tensor gradient = gradient_like(call, a.student);
  Forward f = forward(a, call, &gradient);
  give_back(stack, f.loss, f.value, f.stats, f.selected, f.counts, gradient);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  const RowStatsCall a{Arguments(stack)};
  const CpuCall call(a.call());
  const bool with_labels = call.problem.with_labels;
  Tensor candidate = call.per_row(dtypes().boolean, a.student);
  cpu::mark_candidates(call.problem, candidate.mutable_data<uint8_t>());
  Tensor cross_entropy = cross_entropy_like(call, a.student);
  Rows rows = read_rows(call, a.student, a.score, a.value, with_labels ? cross_entropy.mutable_data<void>() : nullptr,
                        candidate.data<uint8_t>());
  give_back(stack, rows.value, rows.stats, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  const SelectCall a{Arguments(stack)};
  const auto* candidates = a.candidate.data<uint8_t>();
  const int64_t n = std::count(candidates, candidates + a.value.numel(), uint8_t{1});
  Tensor selected = Tensor::empty(a.value.sizes(), a.value.dim(), dtypes().boolean, a.value);
  select(a.value, candidates, number_to_keep(a.keep.fraction, a.keep.count, n), selected);
  give_back(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  const ReduceCall a{Arguments(stack)};
  const CpuCall call(a.call());
  Tensor loss =
      reduce(call, a.options, a.student, a.row_weight, a.selected, a.stats, a.cross_entropy.data<void>(), a.counts.data<int64_t>());
  give_back(stack, loss);
}

void write_gradient(const BackwardCall& a, const CpuCall& call, const Logits& out) {
  const Problem& p = call.problem;
  const auto* selected = a.selected.data<uint8_t>();
  for (int64_t i = 0; i < p.rows; ++i)
    require(!selected[i] || p.teacher_row_of(i) >= 0, "selected names a row that the teacher does not hold");
  Gradient gradient = gradient_of(call, a.options, a.row_weight, a.counts.data<int64_t>(), out);
  gradient.stats = a.stats.data<void>();
  gradient.selected = selected;
  gradient.grad_output = a.grad_output.data<void>();
  gradient.grad_output_stride = a.one_for_all() ? 0 : 1;
  write_rows(call, gradient);
}

void condensed_kd_backward(StableIValue* stack, uint64_t, uint64_t) {
  const BackwardCall a{Arguments(stack)};
  const CpuCall call(a.call());
  Tensor out = gradient_like(call, a.student);
  write_gradient(a, call, logits_of(out, out.mutable_data<void>()));
  give_back(stack, out);
}

void condensed_kd_gradient_(StableIValue* stack, uint64_t, uint64_t) {
  const BackwardCall a{Arguments(stack)};
  write_gradient(a, CpuCall(a.call()), logits_of(a.student, a.student.mutable_data<void>()));
}

}   // namespace

const OperatorKernels& cpu_operators() {
  static const OperatorKernels kernels{
      condensed_kd, condensed_kd_with_gradient, condensed_kd_backward, condensed_kd_gradient_, row_stats, select_topk, reduce_rows};
  return kernels;
}

}   // namespace kcd
