// The operators on the CPU.
#include "cpu/buffer.h"
#include "cpu/reduce.h"
#include "torch/cpu_call.h"

namespace kcd {
namespace {

// A gradient's memory: torch's or, where it is large, the one that the last gradient left.
Tensor gradient_like(const Call& call, const View& student) {
  const size_t bytes = static_cast<size_t>(call.problem.rows * call.problem.classes * size_of(call.problem.student.type));
  if (bytes < cpu::kLargeBytes || !Tensor::can_be_over_memory() || cpu::gradient_memory() == cpu::Memory::torch)
    return call.like_student(student);
  const cpu::Buffer buffer = cpu::take_buffer(bytes);
  const auto give_back = [](void* data, void* size) { cpu::give_back_buffer({data, reinterpret_cast<size_t>(size)}); };
  return Tensor::over(buffer.data, student.sizes(), student.dim(), student.dtype(), student, give_back,
                      reinterpret_cast<void*>(buffer.bytes));
}

// What condensed_kd gives, in torch's memory.
struct Outputs {
  Tensor loss, value, stats, selected, counts;

  Outputs(const ForwardCall& a, const Call& call)
      : loss(loss_like(call, a.options, a.student)),
        value(ranked_like(call, a.score, a.student)),
        stats(stats_like(call, a.student)),
        selected(call.per_row(dtypes().boolean, a.student)),
        counts(Tensor::empty({2}, dtypes().int64, a.student)) {}

  Results results() const {
    return {loss.mutable_data<void>(), value.mutable_data<void>(), stats.mutable_data<void>(), selected.mutable_data<uint8_t>(),
            counts.mutable_data<int64_t>()};
  }
};

void condensed_kd_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall a = ForwardCall::of(arguments);
  const CpuCall call(a.call());
  Outputs out(a, call);
  forward(a, call, out.results(), nullptr);
  give_back(stack, out.loss, out.value, out.stats, out.selected, out.counts);
}

void condensed_kd_with_gradient(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall a = ForwardCall::of(arguments);
  const CpuCall call(a.call());
  require(a.options.reduction != Reduction::none, "the gradient of the rows' losses needs their grad_output");
  Outputs out(a, call);
  Tensor gradient = gradient_like(call, a.student);
  const Logits rows = logits_of(gradient, gradient.mutable_data<void>());
  forward(a, call, out.results(), &rows);
  give_back(stack, out.loss, out.value, out.stats, out.selected, out.counts, gradient);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowStatsCall a(arguments);
  const CpuCall call(a.call());
  Tensor value = ranked_like(call, a.score, a.student), stats = stats_like(call, a.student);
  Tensor cross_entropy = cross_entropy_like(call, a.student), candidate = call.per_row(dtypes().boolean, a.student);
  cpu::mark_candidates(call.problem, candidate.mutable_data<uint8_t>());
  void* cross_entropies = call.problem.with_labels ? cross_entropy.mutable_data<void>() : nullptr;
  read_rows(call, a.score, a.value,
            {value.mutable_data<void>(), stats.mutable_data<void>(), cross_entropies, candidate.mutable_data<uint8_t>()});
  give_back(stack, value, stats, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const SelectCall a(arguments);
  const auto* candidates = a.candidate.data<uint8_t>();
  const int64_t rows = a.value.numel(), n = std::count(candidates, candidates + rows, uint8_t{1});
  Tensor selected = Tensor::empty(a.value.sizes(), a.value.dim(), dtypes().boolean, a.value);
  select(a.value.data<void>(), a.is_double(), candidates, rows, number_to_keep(a.keep.fraction, a.keep.count, n),
         selected.mutable_data<uint8_t>());
  give_back(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ReduceCall a(arguments);
  const CpuCall call(a.call());
  Tensor loss = loss_like(call, a.options, a.student);
  reduce(call, a.options, a.row_weight, a.selected.data<uint8_t>(), a.stats.data<void>(), a.cross_entropy.data<void>(),
         a.counts.data<int64_t>(), loss.mutable_data<void>());
  give_back(stack, loss);
}

void condensed_kd_gradient(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const BackwardCall a = BackwardCall::of(arguments);
  const CpuCall call(a.call());
  Tensor out = gradient_like(call, a.student);
  write_gradient(a, call, logits_of(out, out.mutable_data<void>()));
  give_back(stack, out);
}

void condensed_kd_gradient_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const BackwardCall a = BackwardCall::of(arguments);
  write_gradient(a, CpuCall(a.call()), logits_of(a.student, arguments[BackwardCall::kStudent].mutable_data<void>()));
}

}   // namespace

const OperatorKernels& cpu_operators() {
  static const OperatorKernels kernels{condensed_kd_forward,
                                       condensed_kd_forward,
                                       condensed_kd_with_gradient,
                                       condensed_kd_gradient,
                                       condensed_kd_gradient,
                                       condensed_kd_gradient_,
                                       row_stats,
                                       select_topk,
                                       reduce_rows};
  return kernels;
}

}   // namespace kcd
