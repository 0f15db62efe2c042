// The operators on CUDA devices.  They use torch's allocator and torch's current stream, and never wait for the device.
#include <optional>

#include "cuda/launch.h"
#include "torch/call.h"
#include "torch/device.h"

namespace kcd {
namespace {

// A checked call on its device.  Resolves `rows=` to the teacher's rows.
class CudaCall : public Call {
 public:
  CudaCall(const Call& call, const View& student) : Call(call), device_(student) {
    constexpr int64_t kMax = int64_t{1} << 30;
    require(problem.rows <= kMax && problem.classes <= kMax, "the CUDA kernels support at most 2^30 rows and 2^30 classes, got ",
            problem.rows, " and ", problem.classes);
    if (!has_row_indices) return;
    teacher_row_.emplace(Tensor::empty({problem.rows}, dtypes().int64, student));
    int64_t* teacher_row = teacher_row_->mutable_data<int64_t>();
    cuda::launch_map_rows(row_indices, teacher_rows, teacher_row, problem.rows, context());
    problem.teacher_row = teacher_row;
  }

  const cuda::DeviceContext& context() const { return device_.context(); }

 private:
  DeviceScope device_;
  std::optional<Tensor> teacher_row_;
};

// Allocates from torch's allocator, which does not reuse the memory before this stream is done with it.
Tensor allocate_bytes(size_t n, const View& like) { return Tensor::empty({static_cast<int64_t>(n)}, dtypes().boolean, like); }

cuda::LossSumParams loss_sum_params(const Call& call, const LossOptions& options, const View& row_weight) {
  return {check_row_weight(call, row_weight), options.kd_weight * options.temperature * options.temperature, options.ce_weight,
          options.reduction, options.ranks};
}

cuda::Keep keep_params(const KeepOptions& keep) { return {keep.fraction, keep.count}; }

cuda::RowStatsParams row_stats_params(const Call& call, const View& score, Value value, const State& state) {
  cuda::RowStatsParams params{};
  params.problem = call.problem;
  // The teacher's entropy only ranks: write it directly to the ranking values.
  params.outputs = {state.stats(), nullptr, value == Value::teacher_entropy ? state.value() : nullptr};
  params.value = value;
  params.score = value == Value::score ? score.data<void>() : nullptr;
  params.value_is_double = ranks_by_double(call, score);
  params.ranked = state.value();
  return params;
}

void run_row_stats(const cuda::RowStatsParams& params, const View& like, const cuda::DeviceContext& context) {
  const Tensor workspace = allocate_bytes(cuda::workspace_bytes(params, context), like);
  cuda::launch_row_stats(params, context, workspace.mutable_data<void>());
}

void condensed_kd(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const CondensedKDArguments a = CondensedKDArguments::from(arguments);
  require(!a.with_gradient, "`with_gradient` is supported on the CPU only");
  const CudaCall call(a.check(), a.student);
  Tensor loss = empty_loss(call, a.options, a.student), state = empty_state(call, a.score, a.student);
  Tensor gradient = Tensor::empty({0}, a.student.dtype(), a.student);
  const State rows = make_state(call, ranks_by_double(call, a.score), state.mutable_data<void>());
  const cuda::FusedLoss fused_loss{keep_params(a.keep), loss_sum_params(call, a.options, a.row_weight), rows.selected(),
                                   loss.mutable_data<void>(), rows.counts()};
  cuda::RowStatsParams params = row_stats_params(call, a.score, a.value, rows);
  params.loss = &fused_loss;
  run_row_stats(params, a.student, call.context());
  return_results(stack, loss, state, gradient);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const RowStatsArguments a(arguments);
  const CudaCall call(a.check(), a.student);
  Tensor state = empty_state(call, a.score, a.student), cross_entropy = empty_cross_entropy(call, a.student);
  Tensor candidate = call.empty_per_row(dtypes().boolean, a.student);
  const State rows = make_state(call, ranks_by_double(call, a.score), state.mutable_data<void>());
  cuda::clear_state(rows, call.context());   // nothing is selected yet
  cuda::RowStatsParams params = row_stats_params(call, a.score, a.value, rows);
  if (call.problem.with_cross_entropy()) params.outputs.cross_entropy = cross_entropy.mutable_data<void>();
  params.candidate = candidate.mutable_data<uint8_t>();
  run_row_stats(params, a.student, call.context());
  return_results(stack, state, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const SelectTopkArguments a(arguments);
  const DeviceScope device(a.value);
  Tensor selected = Tensor::empty(a.value.sizes(), a.value.dim(), dtypes().boolean, a.value);
  const cuda::SelectTopkParams params{a.value.data<void>(), a.is_double(),       a.candidate.data<uint8_t>(),
                                      a.value.numel(),      keep_params(a.keep), selected.mutable_data<uint8_t>()};
  const Tensor workspace = allocate_bytes(cuda::workspace_bytes(params, device.context()), a.value);
  cuda::launch_select_topk(params, device.context(), workspace.mutable_data<void>());
  return_results(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  BoxedArguments arguments(stack);
  const ReduceRowsArguments a(arguments);
  const CudaCall call(a.check(), a.student);
  Tensor loss = empty_loss(call, a.options, a.student);
  const State state = check_state(call, a.state);
  const cuda::ReduceRowsParams params{call.problem,
                                      state.stats() + kKl * call.problem.rows * call.accumulator_bytes(),
                                      a.cross_entropy.data<void>(),
                                      state.selected(),
                                      state.counts(),
                                      loss_sum_params(call, a.options, a.row_weight),
                                      loss.mutable_data<void>()};
  const Tensor workspace = allocate_bytes(cuda::workspace_bytes(params, call.context()), a.student);
  cuda::launch_reduce_rows(params, call.context(), workspace.mutable_data<void>());
  return_results(stack, loss);
}

void write_gradient(const CondensedKDBackwardArguments& a, const CudaCall& call, const Logits& out) {
  const State state = check_state(call, a.state);
  const cuda::CondensedKDBackwardParams params{call.problem,
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
  cuda::launch_condensed_kd_backward(params, call.context());
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
