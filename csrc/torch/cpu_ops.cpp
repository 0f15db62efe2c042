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
  const auto deleter = [](void* data, void* size) { cpu::release_buffer({data, reinterpret_cast<size_t>(size)}); };
  return Tensor::over(buffer.data, student.sizes(), student.dim(), student.dtype(), student, deleter,
                      reinterpret_cast<void*>(buffer.bytes));
}

void condensed_kd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall a = ForwardCall::of(arguments);
  const CpuCall call(a.call());
  Tensor loss = loss_like(call, a.options, a.student), state = state_like(call, a.score, a.student);
  Tensor gradient = a.with_gradient ? gradient_like(call, a.student) : Tensor::empty({0}, a.student.dtype(), a.student);
  forward(a, call, loss.mutable_data<void>(), state_of(call, ranks_by_double(call, a.score), state.mutable_data<void>()),
          logits_of(gradient, gradient.mutable_data<void>()));
  return_results(stack, loss, state, gradient);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowStatsCall a(arguments);
  const CpuCall call(a.call());
  Tensor state = state_like(call, a.score, a.student), cross_entropy = cross_entropy_like(call, a.student);
  Tensor candidate = call.per_row(dtypes().boolean, a.student);
  const State rows = state_of(call, ranks_by_double(call, a.score), state.mutable_data<void>());
  std::fill_n(rows.data, rows.bytes(), char{0});   // nothing is selected yet
  cpu::mark_candidates(call.problem, candidate.mutable_data<uint8_t>());
  void* cross_entropies = call.problem.with_labels ? cross_entropy.mutable_data<void>() : nullptr;
  read_rows(call, a.score, a.value, {rows.value(), rows.stats(), cross_entropies, candidate.mutable_data<uint8_t>()});
  return_results(stack, state, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const SelectCall a(arguments);
  const auto* candidates = a.candidate.data<uint8_t>();
  const int64_t rows = a.value.numel(), n = std::count(candidates, candidates + rows, uint8_t{1});
  Tensor selected = Tensor::empty(a.value.sizes(), a.value.dim(), dtypes().boolean, a.value);
  select(a.value.data<void>(), a.is_double(), candidates, rows, number_to_keep(a.keep.fraction, a.keep.count, n),
         selected.mutable_data<uint8_t>());
  return_results(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ReduceCall a(arguments);
  const CpuCall call(a.call());
  Tensor loss = loss_like(call, a.options, a.student);
  reduce(call, a.options, a.row_weight, given_state(call, a.state), a.cross_entropy.data<void>(), loss.mutable_data<void>());
  return_results(stack, loss);
}

void condensed_kd_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const BackwardCall a = BackwardCall::of(arguments);
  const CpuCall call(a.call());
  Tensor out = gradient_like(call, a.student);
  write_gradient(a, call, logits_of(out, out.mutable_data<void>()));
  return_results(stack, out);
}

void condensed_kd_backward_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const BackwardCall a = BackwardCall::of(arguments);
  write_gradient(a, CpuCall(a.call()), logits_of(a.student, arguments[BackwardCall::kStudent].mutable_data<void>()));
}

}   // namespace

const OperatorKernels& cpu_operators() {
  static const OperatorKernels kernels{condensed_kd, condensed_kd_backward, condensed_kd_backward_,
                                       row_stats,    select_topk,           reduce_rows};
  return kernels;
}

}   // namespace kcd
