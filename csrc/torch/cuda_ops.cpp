// The operators on CUDA devices: memory from torch's allocator, work on torch's stream, nothing waits for the device.
#include <optional>

#include "cuda/launch.h"
#include "torch/call.h"
#include "torch/device.h"

namespace kcd {
namespace {

// A call that has been checked, on its device, where the teacher's rows are known.
class CudaCall : public Call {
 public:
  CudaCall(const Call& call, const View& student) : Call(call), device_(student) {
    constexpr int64_t kMost = int64_t{1} << 30;
    require(problem.rows <= kMost && problem.classes <= kMost, "the CUDA kernels take up to 2^30 rows and classes");
    if (!has_row_indices) return;
    teacher_row_.emplace(Tensor::empty({problem.rows}, dtypes().int64, student));
    int64_t* teacher_row = teacher_row_->mutable_data<int64_t>();
    cuda::map_teacher_rows(row_indices, teacher_rows, teacher_row, problem.rows, machine());
    problem.teacher_row = teacher_row;
  }

  const cuda::Machine& machine() const { return device_.machine(); }

 private:
  OnDevice device_;
  std::optional<Tensor> teacher_row_;
};

// Bytes from torch's allocator, which gives them to nobody else before this stream is done with them.
Tensor bytes_like(size_t n, const View& like) { return Tensor::empty({static_cast<int64_t>(n)}, dtypes().boolean, like); }

cuda::Sum sum_of(const Call& call, const LossOptions& options, const View& row_weight) {
  return {check_row_weight(call, row_weight), options.kd_weight * options.temperature * options.temperature, options.ce_weight,
          options.reduction, options.ranks};
}

cuda::Keep keep_of(const KeepOptions& keep) { return {keep.fraction, keep.count}; }

cuda::Forward forward_of(const Call& call, const View& score, Value value, const State& state) {
  cuda::Forward forward{};
  forward.problem = call.problem;
  // The teacher's entropy only ranks: it is written where the ranking is read from.
  forward.outputs = {state.stats(), nullptr, value == Value::teacher_entropy ? state.value() : nullptr};
  forward.value = value;
  forward.score = value == Value::score ? score.data<void>() : nullptr;
  forward.value_is_double = ranks_by_double(call, score);
  forward.ranked = state.value();
  return forward;
}

void run(const cuda::Forward& forward, const View& like, const cuda::Machine& machine) {
  const Tensor workspace = bytes_like(cuda::workspace_of(forward, machine), like);
  cuda::forward(forward, machine, workspace.mutable_data<void>());
}

void condensed_kd(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const CondensedKDArguments a = CondensedKDArguments::from(arguments);
  require(!a.with_gradient, "the forward pass writes the gradient on the CPU alone");
  const CudaCall call(a.check(), a.student);
  Tensor loss = empty_loss(call, a.options, a.student), state = empty_state(call, a.score, a.student);
  Tensor gradient = Tensor::empty({0}, a.student.dtype(), a.student);
  const State rows = make_state(call, ranks_by_double(call, a.score), state.mutable_data<void>());
  const cuda::Loss outputs{keep_of(a.keep), sum_of(call, a.options, a.row_weight), rows.selected(), loss.mutable_data<void>(),
                           rows.counts()};
  cuda::Forward forward = forward_of(call, a.score, a.value, rows);
  forward.loss = &outputs;
  run(forward, a.student, call.machine());
  return_results(stack, loss, state, gradient);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const RowStatsArguments a(arguments);
  const CudaCall call(a.check(), a.student);
  Tensor state = empty_state(call, a.score, a.student), cross_entropy = empty_cross_entropy(call, a.student);
  Tensor candidate = call.empty_per_row(dtypes().boolean, a.student);
  const State rows = make_state(call, ranks_by_double(call, a.score), state.mutable_data<void>());
  cuda::clear(rows, call.machine());   // nothing is selected yet
  cuda::Forward forward = forward_of(call, a.score, a.value, rows);
  if (call.problem.with_labels) forward.outputs.cross_entropy = cross_entropy.mutable_data<void>();
  forward.candidate = candidate.mutable_data<uint8_t>();
  run(forward, a.student, call.machine());
  return_results(stack, state, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const SelectTopkArguments a(arguments);
  const OnDevice device(a.value);
  Tensor selected = Tensor::empty(a.value.sizes(), a.value.dim(), dtypes().boolean, a.value);
  const cuda::Select select{a.value.data<void>(), a.is_double(),   a.candidate.data<uint8_t>(),
                            a.value.numel(),      keep_of(a.keep), selected.mutable_data<uint8_t>()};
  const Tensor workspace = bytes_like(cuda::workspace_of(select, device.machine()), a.value);
  cuda::select(select, device.machine(), workspace.mutable_data<void>());
  return_results(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const ReduceRowsArguments a(arguments);
  const CudaCall call(a.check(), a.student);
  Tensor loss = empty_loss(call, a.options, a.student);
  const State state = check_state(call, a.state);
  const cuda::Reduce reduce{call.problem,
                            state.stats() + kKl * call.problem.rows * call.accumulator_bytes(),
                            a.cross_entropy.data<void>(),
                            state.selected(),
                            state.counts(),
                            sum_of(call, a.options, a.row_weight),
                            loss.mutable_data<void>()};
  const Tensor workspace = bytes_like(cuda::workspace_of(reduce, call.machine()), a.student);
  cuda::reduce(reduce, call.machine(), workspace.mutable_data<void>());
  return_results(stack, loss);
}

void write_gradient(const CondensedKDBackwardArguments& a, const CudaCall& call, const Logits& out) {
  const State state = check_state(call, a.state);
  const cuda::Backward backward{call.problem,
                                state.stats(),
                                state.selected(),
                                check_row_weight(call, a.row_weight),
                                a.grad_output.data<void>(),
                                a.has_scalar_grad_output() ? 0 : 1,
                                state.counts(),
                                a.options.kd_weight * a.options.temperature,
                                a.options.ce_weight,
                                a.options.reduction,
                                a.options.ranks,
                                out};
  cuda::backward(backward, call.machine());
}

void condensed_kd_backward(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const CondensedKDBackwardArguments a = CondensedKDBackwardArguments::from(arguments);
  const CudaCall call(a.check(), a.student);
  Tensor out = call.empty_like_student(a.student);
  write_gradient(a, call, make_logits(out, out.mutable_data<void>()));
  return_results(stack, out);
}

void condensed_kd_backward_(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const CondensedKDBackwardArguments a = CondensedKDBackwardArguments::from(arguments);
  write_gradient(a, CudaCall(a.check(), a.student),
                 make_logits(a.student, arguments[CondensedKDBackwardArguments::kStudent].mutable_data<void>()));
}

}   // namespace

const OperatorKernels& cuda_operators() {
  static const OperatorKernels kernels{condensed_kd, condensed_kd_backward, condensed_kd_backward_,
                                       row_stats,    select_topk,           reduce_rows};
  return kernels;
}

}   // namespace kcd
