// The operators on the CPU.
#include "cpu/gradient_memory.h"
#include "cpu/reduce_rows.h"
#include "torch/cpu_condensed_kd.h"

namespace kcd {
namespace {

// Returns an uninitialised gradient, in torch's memory or, if it is large, in the buffer of the previous gradient.
Tensor empty_gradient(const Call& call, const View& student) {
  const size_t bytes = static_cast<size_t>(call.problem.rows * call.problem.classes * size_of(call.problem.student.type));
  if (bytes < cpu::kLargeBytes || !Tensor::has_from_blob() || cpu::gradient_memory() == cpu::Memory::torch)
    return call.empty_like_student(student);
  const cpu::Buffer buffer = cpu::take_buffer(bytes);
  const auto deleter = [](void* data, void* size) { cpu::release_buffer({data, reinterpret_cast<size_t>(size)}); };
  return Tensor::from_blob(buffer.data, student.sizes(), student.dim(), student.dtype(), student, deleter,
                           reinterpret_cast<void*>(buffer.bytes));
}

void condensed_kd(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const CondensedKDArguments a = CondensedKDArguments::from(arguments);
  const CpuCall call(a.check());
  Tensor loss = empty_loss(call, a.options, a.student), state = empty_state(call, a.score, a.student);
  Tensor gradient = a.with_gradient ? empty_gradient(call, a.student) : Tensor::empty({0}, a.student.dtype(), a.student);
  cpu::condensed_kd(a, call, loss.mutable_data<void>(),
                    make_state(call, ranks_by_double(call, a.score), state.mutable_data<void>()),
                    make_logits(gradient, gradient.mutable_data<void>()));
  return_results(stack, loss, state, gradient);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const RowStatsArguments a(arguments);
  const CpuCall call(a.check());
  Tensor state = empty_state(call, a.score, a.student), cross_entropy = empty_cross_entropy(call, a.student);
  Tensor candidate = call.empty_per_row(dtypes().boolean, a.student);
  const State rows = make_state(call, ranks_by_double(call, a.score), state.mutable_data<void>());
  std::fill_n(rows.data, rows.bytes(), char{0});   // no row is selected yet
  cpu::mark_candidates(call.problem, candidate.mutable_data<uint8_t>());
  void* cross_entropies = call.problem.with_cross_entropy() ? cross_entropy.mutable_data<void>() : nullptr;
  cpu::row_stats(call, a.score, a.value, {rows.value(), rows.stats(), cross_entropies, candidate.mutable_data<uint8_t>()});
  return_results(stack, state, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const SelectTopkArguments a(arguments);
  const auto* candidates = a.candidate.data<uint8_t>();
  const int64_t rows = a.value.numel(), n = std::count(candidates, candidates + rows, uint8_t{1});
  Tensor selected = Tensor::empty(a.value.sizes(), a.value.dim(), dtypes().boolean, a.value);
  cpu::select_topk(a.value.data<void>(), a.is_double(), candidates, rows, number_to_keep(a.keep.fraction, a.keep.count, n),
                   selected.mutable_data<uint8_t>());
  return_results(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const ReduceRowsArguments a(arguments);
  const CpuCall call(a.check());
  Tensor loss = empty_loss(call, a.options, a.student);
  cpu::reduce_rows(call, a.options, a.row_weight, check_state(call, a.state), a.cross_entropy.data<void>(),
                   loss.mutable_data<void>());
  return_results(stack, loss);
}

void condensed_kd_backward(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const CondensedKDBackwardArguments a = CondensedKDBackwardArguments::from(arguments);
  const CpuCall call(a.check());
  Tensor out = empty_gradient(call, a.student);
  cpu::condensed_kd_backward(a, call, make_logits(out, out.mutable_data<void>()));
  return_results(stack, out);
}

void condensed_kd_backward_(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const CondensedKDBackwardArguments a = CondensedKDBackwardArguments::from(arguments);
  const Tensor& student = arguments[CondensedKDBackwardArguments::kStudent];
  cpu::condensed_kd_backward(a, CpuCall(a.check()), make_logits(a.student, student.mutable_data<void>()));
}

}   // namespace

const OperatorKernels& cpu_operators() {
  static const OperatorKernels kernels{condensed_kd, condensed_kd_backward, condensed_kd_backward_,
                                       row_stats,    select_topk,           reduce_rows};
  return kernels;
}

}   // namespace kcd
