// Launch shapes, workspace layout and kernel launches.
#include "cuda/launch.h"

#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/condensed_kd_backward.cuh"
#include "cuda/map_rows.cuh"
#include "cuda/reduce_rows.cuh"
#include "cuda/row_stats.cuh"
#include "cuda/select_topk.cuh"
#include "cuda/shape.h"

namespace kcd::cuda {
namespace {

// Lays out the workspace of a call.  Take the arrays that start as zeros first.  With a null base it only counts bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t n) {
    constexpr size_t kAlignment = 16;
    const size_t offset = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    bytes_ = offset + static_cast<size_t>(n) * sizeof(T);
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }
  size_t bytes() const { return bytes_; }
  void* base() const { return base_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

cudaStream_t stream_of(const DeviceContext& context) { return static_cast<cudaStream_t>(context.stream); }

void check_cuda(cudaError_t error, const char* action, int64_t rows, int64_t classes) {
  if (error == cudaSuccess) return;
  const std::string shape = std::to_string(rows) + " rows" + (classes ? " of " + std::to_string(classes) + " classes" : "");
  throw std::runtime_error(std::string("kcd_ext: ") + action + " for " + shape + ": " + cudaGetErrorString(error) + " (built for " +
                           architectures() + ")");
}

dim3 make_grid(int64_t x, int y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

LaunchShape problem_shape(const Problem& p, const DeviceContext& context) {
  return choose_shape(p.rows, p.classes, context.num_sms, context.block_threads,
                      p.student.type == Type::float64 || p.with_targets());
}

// ---- select_topk

// Blocks that share a pass over many rows.
int64_t slice_blocks(int64_t rows, const DeviceContext& context) {
  constexpr int64_t kRowsPerBlock = 4096;
  const int64_t wanted = rows / kRowsPerBlock + 1, most = int64_t{context.num_sms} * 2;
  return wanted < most ? wanted : most;
}

int slice_threads(int64_t rows, const DeviceContext& context) {
  return rows > kLargeBlockRows ? 3 * context.block_threads : context.block_threads;
}

Selection make_selection(const Keep& keep, uint8_t* selected) { return {keep.fraction, keep.count, selected, nullptr, nullptr}; }

// Returns how many bytes at the start of the workspace must be zero.
size_t reserve_selection(Selection& selection, int64_t rows, const DeviceContext& context, Workspace& workspace) {
  if (rows <= kMaxRowsOneBlock) return 0;
  selection.state = workspace.take<SelectionState>(1);
  const size_t zeroed_bytes = workspace.bytes();
  selection.block_counts = workspace.take<unsigned>(slice_blocks(rows, context) * kBuckets);
  return zeroed_bytes;
}

void launch_select_topk(const Ranking& ranking, const Selection& selection, const DeviceContext& context) {
  const cudaStream_t stream = stream_of(context);
  const int64_t rows = ranking.rows;
  const dim3 block(static_cast<unsigned>(slice_threads(rows, context)));
  if (rows <= kMaxRowsOneBlock)
    return check_cuda(gpu::launch(select_by_one_block, dim3(1), block, 0, stream, ranking, selection),
                      "CUDA kernel select_by_one_block", rows, 0);
  const dim3 grid = make_grid(slice_blocks(rows, context));
  for (int digit = 0; digit < ranking.digits(); ++digit)
    check_cuda(gpu::launch(select_digit, grid, block, 0, stream, ranking, selection, digit), "CUDA kernel select_digit", rows, 0);
  check_cuda(gpu::launch(select_mark, grid, block, 0, stream, ranking, selection), "CUDA kernel select_mark", rows, 0);
}

struct SelectPlan {
  Ranking ranking;
  Selection selection;
  size_t zeroed_bytes;
};

SelectPlan plan(const SelectTopkParams& params, const DeviceContext& context, Workspace& workspace) {
  SelectPlan plan{
      {params.value, params.value_is_double, params.candidate, params.rows}, make_selection(params.keep, params.selected), 0};
  plan.zeroed_bytes = reserve_selection(plan.selection, params.rows, context, workspace);
  return plan;
}

// ---- reduce_rows

LossArguments loss_arguments(const LossSumParams& sum, const void* kl, const void* cross_entropy, const uint8_t* selected,
                             void* loss) {
  return {kl,        cross_entropy, sum.row_weight, selected, sum.kd_factor, sum.ce_weight, sum.reduction,
          sum.ranks, loss,          nullptr,        nullptr};
}

struct ReducePlan {
  unsigned* arrived;
  LossSums* block_sums;
  size_t zeroed_bytes;
};

ReducePlan reserve_reduction(int64_t rows, const DeviceContext& context, Workspace& workspace) {
  ReducePlan plan{};
  plan.arrived = workspace.take<unsigned>(1);
  plan.zeroed_bytes = workspace.bytes();
  plan.block_sums = workspace.take<LossSums>(slice_blocks(rows, context));
  return plan;
}

template <class Real>
void launch_reduce_rows(const Problem& problem, const LossArguments& loss, const ReducePlan& plan, const DeviceContext& context) {
  const int64_t rows = problem.rows;
  const dim3 grid = make_grid(slice_blocks(rows, context)), block(static_cast<unsigned>(slice_threads(rows, context)));
  check_cuda(gpu::launch(reduce_rows<Real>, grid, block, 0, stream_of(context), problem, loss, plan.block_sums, plan.arrived),
             "CUDA kernel reduce_rows", rows, 0);
}

// ---- row_stats and, with a FusedLoss, condensed_kd

template <class Real>
struct RowStatsPlan {
  RowStatsArguments<Real> arguments;
  LaunchShape shape;
  bool separate_selection;   // selection and loss run as separate launches
  ReducePlan reduction;
  size_t zeroed_bytes;
};

template <class Real>
RowStatsPlan<Real> plan(const RowStatsParams& params, const DeviceContext& context, Workspace& workspace) {
  const Problem& p = params.problem;
  RowStatsPlan<Real> plan{};
  RowStatsArguments<Real>& a = plan.arguments;
  plan.shape = problem_shape(p, context);
  plan.separate_selection = params.loss && (p.rows > kMaxRowsOneBlock || p.rows == 0);
  a.problem = p;
  a.outputs = params.outputs;
  a.scale = scale_of<Real>(p.temperature);
  a.row_threads = plan.shape.row_threads;
  a.parts = plan.shape.parts;
  a.with_teacher_entropy = params.outputs.teacher_entropy != nullptr;
  a.value = params.value;
  a.score = params.score;
  a.ranked = params.ranked;
  a.candidate = params.candidate;
  a.fused_loss = params.loss && !plan.separate_selection;

  // Everything up to `zeroed_bytes` starts as zeros.
  if (params.loss) a.blocks_arrived = workspace.take<unsigned>(1);
  if (a.parts > 1) a.parts_arrived = workspace.take<unsigned>(p.rows);
  if (params.loss) a.selection = make_selection(params.loss->keep, params.loss->selected);
  if (plan.separate_selection) {
    a.selection.state = workspace.take<SelectionState>(1);
    plan.reduction.arrived = workspace.take<unsigned>(1);
  }
  plan.zeroed_bytes = workspace.bytes();

  if (a.parts > 1 && p.with_targets())
    a.pieces = workspace.take<RowSumsWithTargets<Real>>(p.rows * a.parts);
  else if (a.parts > 1)
    a.pieces = workspace.take<RowSums<Real>>(p.rows * a.parts);
  a.ranking = {params.ranked, params.value_is_double, a.candidate, p.rows};
  if (!params.loss) return plan;
  if (!a.candidate) a.ranking.candidate = a.candidate = workspace.take<uint8_t>(p.rows);
  if (p.with_labels && !a.outputs.cross_entropy) a.outputs.cross_entropy = workspace.take<Real>(p.rows);
  if (plan.separate_selection) {
    a.selection.block_counts = workspace.take<unsigned>(slice_blocks(p.rows, context) * kBuckets);
    plan.reduction.block_sums = workspace.take<LossSums>(slice_blocks(p.rows, context));
  }
  a.loss = loss_arguments(params.loss->sum, static_cast<const Real*>(params.outputs.stats) + kKl * p.rows, a.outputs.cross_entropy,
                          params.loss->selected, params.loss->loss);
  a.loss.counts_out = params.loss->counts;
  return plan;
}

template <class Real>
void launch_row_stats(const RowStatsParams& params, const DeviceContext& context, Workspace workspace) {
  const RowStatsPlan<Real> planned = plan<Real>(params, context, workspace);
  const RowStatsArguments<Real>& a = planned.arguments;
  const Problem& p = params.problem;
  const cudaStream_t stream = stream_of(context);
  if (planned.zeroed_bytes > 0)
    check_cuda(gpu::fill(workspace.base(), 0, planned.zeroed_bytes, stream), "zeroing the workspace", p.rows, p.classes);
  const auto kernel = p.with_targets() ? forward_rows_with_targets<Real> : forward_rows<Real>;
  if (p.rows > 0)
    check_cuda(gpu::launch(kernel, make_grid(planned.shape.row_blocks, a.parts),
                           dim3(static_cast<unsigned>(planned.shape.block_threads)), 0, stream, a),
               "CUDA kernel forward_rows", p.rows, p.classes);
  if (!planned.separate_selection) return;
  if (p.rows > 0) launch_select_topk(a.ranking, a.selection, context);
  launch_reduce_rows<Real>(p, a.loss, planned.reduction, context);
}

// ---- condensed_kd_backward

template <class Real>
void launch_condensed_kd_backward(const CondensedKDBackwardParams& params, const DeviceContext& context) {
  const Problem& p = params.problem;
  if (p.rows == 0) return;
  const LaunchShape shape = problem_shape(p, context);
  const int threads = context.block_threads < shape.block_threads ? context.block_threads : shape.block_threads,
            block_rows = threads / shape.row_threads;
  const BackwardArguments<Real> a{p,
                                  scale_of<Real>(p.temperature),
                                  shape.row_threads,
                                  shape.parts,
                                  static_cast<const Real*>(params.stats),
                                  params.selected,
                                  static_cast<const Real*>(params.row_weight),
                                  static_cast<const Real*>(params.grad_output),
                                  params.grad_output_stride,
                                  params.counts,
                                  static_cast<Real>(params.kd_factor),
                                  static_cast<Real>(params.ce_weight),
                                  params.reduction == Reduction::mean,
                                  static_cast<Real>(params.ranks),
                                  params.out};
  const auto kernel = p.with_targets() ? backward_rows_with_targets<Real> : backward_rows<Real>;
  check_cuda(gpu::launch(kernel, make_grid((p.rows + block_rows - 1) / block_rows, shape.parts),
                         dim3(static_cast<unsigned>(threads)), 0, stream_of(context), a),
             "CUDA kernel backward_rows", p.rows, p.classes);
}

bool is_double(const Problem& p) { return p.student.type == Type::float64; }

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}   // namespace

std::string version_problem(int driver, int runtime) {
  if (driver / 1000 >= runtime / 1000) return "";
  const std::string found = driver == 0 ? "no NVIDIA driver was found" : "the driver is for CUDA " + version(driver);
  return "kcd_ext was built with CUDA " + version(runtime) + ", but " + found + ": install a driver for CUDA " +
         std::to_string(runtime / 1000) + ", or build kcd_ext with the nvcc of an older CUDA";
}

#ifdef __CUDACC__
namespace {

const void* const kKernels[] = {reinterpret_cast<const void*>(&forward_rows<float>),
                                reinterpret_cast<const void*>(&forward_rows<double>),
                                reinterpret_cast<const void*>(&forward_rows_with_targets<float>),
                                reinterpret_cast<const void*>(&forward_rows_with_targets<double>),
                                reinterpret_cast<const void*>(&backward_rows<float>),
                                reinterpret_cast<const void*>(&backward_rows<double>),
                                reinterpret_cast<const void*>(&backward_rows_with_targets<float>),
                                reinterpret_cast<const void*>(&backward_rows_with_targets<double>),
                                reinterpret_cast<const void*>(&reduce_rows<float>),
                                reinterpret_cast<const void*>(&reduce_rows<double>),
                                reinterpret_cast<const void*>(&select_by_one_block),
                                reinterpret_cast<const void*>(&select_digit),
                                reinterpret_cast<const void*>(&select_mark),
                                reinterpret_cast<const void*>(&map_rows)};

// What to do if the build has no code for a device.
std::string rebuild_hint(int device) {
  int major = 0, minor = 0;
  gpu::clear_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  gpu::clear_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string architecture = std::to_string(major) + std::to_string(minor);
  return ": the device is sm_" + architecture + "; reinstall kcd_ext with the environment variable CUDAARCHS=" + architecture;
}

// CUDA loads a kernel on first use, which fails during graph capture unless the thread is in relaxed capture mode.
void load_kernels(int device) {
  int driver = 0;
  gpu::clear_error(cudaDriverGetVersion(&driver));
  const std::string problem = version_problem(driver, CUDART_VERSION);
  if (!problem.empty()) throw std::runtime_error(problem);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  gpu::clear_error(cudaThreadExchangeStreamCaptureMode(&mode));
  cudaError_t error = cudaSuccess;
  for (const void* kernel : kKernels) {
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = gpu::clear_error(cudaFuncGetAttributes(&attributes, kernel));
  }
  gpu::clear_error(cudaThreadExchangeStreamCaptureMode(&mode));
  if (error != cudaSuccess)
    throw std::runtime_error("kcd_ext: cannot load the kernels on CUDA device " + std::to_string(device) + ": " +
                             cudaGetErrorString(error) + " (built with CUDA " + version(CUDART_VERSION) + " for " +
                             architectures() + "; the driver is for CUDA " + version(driver) + ")" +
                             (error == cudaErrorNoKernelImageForDevice ? rebuild_hint(device) : ""));
}

void load_kernels_once(int device) {
  constexpr int kMaxDevices = 64;   // calls for further devices check each time
  static std::once_flag loaded[kMaxDevices];
  if (device < kMaxDevices)
    std::call_once(loaded[device], load_kernels, device);
  else
    load_kernels(device);
}

}   // namespace

DeviceContext device_context(int device, void* stream) {
  load_kernels_once(device);
  int num_sms = 0;
  const cudaError_t error = gpu::clear_error(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  if (error != cudaSuccess)
    throw std::runtime_error("kcd_ext: cannot query CUDA device " + std::to_string(device) + ": " + cudaGetErrorString(error));
  return {num_sms, stream, kBlockThreads};
}

std::string compiler() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
         std::to_string(__CUDACC_VER_BUILD__);
}

std::string architectures() {
  std::string names;
  for (int architecture : {__CUDA_ARCH_LIST__}) names += (names.empty() ? "sm_" : " sm_") + std::to_string(architecture / 10);
  return names;
}
#else
std::string compiler() { return "none"; }
std::string architectures() { return "none"; }
#endif

size_t workspace_bytes(const RowStatsParams& params, const DeviceContext& context) {
  Workspace workspace(nullptr);
  is_double(params.problem) ? (void)plan<double>(params, context, workspace) : (void)plan<float>(params, context, workspace);
  return workspace.bytes();
}

size_t workspace_bytes(const SelectTopkParams& params, const DeviceContext& context) {
  Workspace workspace(nullptr);
  plan(params, context, workspace);
  return workspace.bytes();
}

size_t workspace_bytes(const ReduceRowsParams& params, const DeviceContext& context) {
  Workspace workspace(nullptr);
  reserve_reduction(params.problem.rows, context, workspace);
  return workspace.bytes();
}

void launch_row_stats(const RowStatsParams& params, const DeviceContext& context, void* workspace) {
  is_double(params.problem) ? launch_row_stats<double>(params, context, Workspace(workspace))
                            : launch_row_stats<float>(params, context, Workspace(workspace));
}

void launch_condensed_kd_backward(const CondensedKDBackwardParams& params, const DeviceContext& context) {
  is_double(params.problem) ? launch_condensed_kd_backward<double>(params, context)
                            : launch_condensed_kd_backward<float>(params, context);
}

void launch_select_topk(const SelectTopkParams& params, const DeviceContext& context, void* memory) {
  if (params.rows == 0) return;
  Workspace workspace(memory);
  const SelectPlan planned = plan(params, context, workspace);
  if (planned.zeroed_bytes > 0)
    check_cuda(gpu::fill(memory, 0, planned.zeroed_bytes, stream_of(context)), "zeroing the workspace", params.rows, 0);
  launch_select_topk(planned.ranking, planned.selection, context);
}

void launch_reduce_rows(const ReduceRowsParams& params, const DeviceContext& context, void* memory) {
  Workspace workspace(memory);
  const ReducePlan planned = reserve_reduction(params.problem.rows, context, workspace);
  check_cuda(gpu::fill(memory, 0, planned.zeroed_bytes, stream_of(context)), "zeroing the workspace", params.problem.rows, 0);
  LossArguments loss = loss_arguments(params.sum, params.kl, params.cross_entropy, params.selected, params.loss);
  loss.counts = params.counts;
  is_double(params.problem) ? launch_reduce_rows<double>(params.problem, loss, planned, context)
                            : launch_reduce_rows<float>(params.problem, loss, planned, context);
}

void clear_state(const State& state, const DeviceContext& context) {
  const auto bytes = static_cast<size_t>(state.bytes());
  check_cuda(gpu::fill(state.data, 0, bytes, stream_of(context)), "clearing the state", state.rows, 0);
}

void launch_map_rows(const int64_t* rows, int64_t n, int64_t* teacher_row, int64_t student_rows, const DeviceContext& context) {
  const cudaStream_t stream = stream_of(context);
  if (student_rows == 0) return;
  check_cuda(gpu::fill(teacher_row, 0xff, static_cast<size_t>(student_rows) * sizeof(int64_t), stream),
             "initialising the teacher's rows", student_rows, 0);
  if (n == 0) return;
  const unsigned threads = static_cast<unsigned>(context.block_threads);
  check_cuda(
      gpu::launch(map_rows, make_grid((n + threads - 1) / threads), dim3(threads), 0, stream, rows, n, teacher_row, student_rows),
      "CUDA kernel map_rows", student_rows, 0);
}

}   // namespace kcd::cuda
