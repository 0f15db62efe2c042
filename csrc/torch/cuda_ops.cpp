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
    if (!rows_are_named) return;
    teacher_row_.emplace(Tensor::empty({problem.rows}, dtypes().int64, student));
    int64_t* teacher_row = teacher_row_->mutable_data<int64_t>();
    cuda::map_teacher_rows(named_rows, teacher_rows, teacher_row, problem.rows, machine());
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
  return {row_weight_of(call, row_weight), options.kd_weight * options.temperature * options.temperature, options.ce_weight,
          options.reduction, options.ranks};
}

cuda::Keep keep_of(const KeepOptions& keep) { return {keep.fraction, keep.count}; }

cuda::Forward forward_of(const Call& call, const View& score, Value value, const Tensor& stats, const Tensor& ranked) {
  const bool by_teacher_entropy = value == Value::teacher_entropy;
  cuda::Forward forward{};
  forward.problem = call.problem;
  // The teacher's entropy only ranks: it is written where the ranking is read from.
  forward.outputs = {stats.mutable_data<void>(), nullptr, by_teacher_entropy ? ranked.mutable_data<void>() : nullptr};
  forward.value = value;
  forward.score = value == Value::score ? score.data<void>() : nullptr;
  forward.value_is_double = ranked.dtype() == dtypes().float64;
  forward.ranked = ranked.mutable_data<void>();
  return forward;
}

void run(const cuda::Forward& forward, const View& like, const cuda::Machine& machine) {
  const Tensor workspace = bytes_like(cuda::workspace_of(forward, machine), like);
  cuda::forward(forward, machine, workspace.mutable_data<void>());
}

void condensed_kd_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ForwardCall a = ForwardCall::of(arguments);
  const CudaCall call(a.call(), a.student);
  Tensor value = ranked_like(call, a.score, a.student), stats = stats_like(call, a.student);
  Tensor selected = call.per_row(dtypes().boolean, a.student), counts = Tensor::empty({2}, dtypes().int64, a.student);
  Tensor loss = loss_like(call, a.options, a.student);
  const cuda::Loss outputs{keep_of(a.keep), sum_of(call, a.options, a.row_weight), selected.mutable_data<uint8_t>(),
                           loss.mutable_data<void>(), counts.mutable_data<int64_t>()};
  cuda::Forward forward = forward_of(call, a.score, a.value, stats, value);
  forward.loss = &outputs;
  run(forward, a.student, call.machine());
  give_back(stack, loss, value, stats, selected, counts);
}

void row_stats(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowStatsCall a(arguments);
  const CudaCall call(a.call(), a.student);
  Tensor value = ranked_like(call, a.score, a.student), stats = stats_like(call, a.student);
  Tensor cross_entropy = cross_entropy_like(call, a.student), candidate = call.per_row(dtypes().boolean, a.student);
  cuda::Forward forward = forward_of(call, a.score, a.value, stats, value);
  if (call.problem.with_labels) forward.outputs.cross_entropy = cross_entropy.mutable_data<void>();
  forward.candidate = candidate.mutable_data<uint8_t>();
  run(forward, a.student, call.machine());
  give_back(stack, value, stats, cross_entropy, candidate);
}

void select_topk(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const SelectCall a(arguments);
  const OnDevice device(a.value);
  Tensor selected = Tensor::empty(a.value.sizes(), a.value.dim(), dtypes().boolean, a.value);
  const cuda::Select select{a.value.data<void>(), a.is_double(),   a.candidate.data<uint8_t>(),
                            a.value.numel(),      keep_of(a.keep), selected.mutable_data<uint8_t>()};
  const Tensor workspace = bytes_like(cuda::workspace_of(select, device.machine()), a.value);
  cuda::select(select, device.machine(), workspace.mutable_data<void>());
  give_back(stack, selected);
}

void reduce_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const ReduceCall a(arguments);
  const CudaCall call(a.call(), a.student);
  Tensor loss = loss_like(call, a.options, a.student);
  const cuda::Reduce reduce{call.problem,
                            a.stats.data<char>() + kKl * call.problem.rows * call.accumulator_bytes(),
                            a.cross_entropy.data<void>(),
                            a.selected.data<uint8_t>(),
                            a.counts.data<int64_t>(),
                            sum_of(call, a.options, a.row_weight),
                            loss.mutable_data<void>()};
  const Tensor workspace = bytes_like(cuda::workspace_of(reduce, call.machine()), a.student);
  cuda::reduce(reduce, call.machine(), workspace.mutable_data<void>());
  give_back(stack, loss);
}

void write_gradient(const BackwardCall& a, const CudaCall& call, const Logits& out) {
  const cuda::Backward backward{call.problem,
                                a.stats.data<void>(),
                                a.selected.data<uint8_t>(),
                                row_weight_of(call, a.row_weight),
                                a.grad_output.data<void>(),
                                a.one_for_all() ? 0 : 1,
                                a.counts.data<int64_t>(),
                                a.options.kd_weight * a.options.temperature,
                                a.options.ce_weight,
                                a.options.reduction,
                                a.options.ranks,
                                out};
  cuda::backward(backward, call.machine());
}

void condensed_kd_gradient(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const BackwardCall a = BackwardCall::of(arguments);
  const CudaCall call(a.call(), a.student);
  Tensor out = call.like_student(a.student);
  write_gradient(a, call, logits_of(out, out.mutable_data<void>()));
  give_back(stack, out);
}

void condensed_kd_gradient_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const BackwardCall a = BackwardCall::of(arguments);
  write_gradient(a, CudaCall(a.call(), a.student), logits_of(a.student, arguments[BackwardCall::kStudent].mutable_data<void>()));
}

}   // namespace

const OperatorKernels& cuda_operators() {
  static const OperatorKernels kernels{nullptr,   condensed_kd_forward,  nullptr,
                                       nullptr,   condensed_kd_gradient, condensed_kd_gradient_,
                                       row_stats, select_topk,           reduce_rows};
  return kernels;
}

}   // namespace kcd
