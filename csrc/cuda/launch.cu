// The launcher unit: shapes, workspace, launches.
#include "cuda/launch.h"

#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/select.cuh"
#include "cuda/shape.h"

namespace kcd::cuda {
namespace {

// What a call needs beside its arguments, taken piece by piece: first what starts as zeros.  Without a base it only adds up.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t n) {
    constexpr size_t kAlignment = 16;
    const size_t at = (bytes_ + kAlignment - 1) / kAlignment * kAlignment;
    bytes_ = at + static_cast<size_t>(n) * sizeof(T);
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t bytes() const { return bytes_; }
  void* base() const { return base_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

cudaStream_t stream_of(const Machine& machine) { return static_cast<cudaStream_t>(machine.stream); }

void check(cudaError_t error, const char* what, int64_t rows, int64_t classes) {
  if (error == cudaSuccess) return;
  const std::string shape = std::to_string(rows) + " rows" + (classes ? " of " + std::to_string(classes) + " classes" : "");
  throw std::runtime_error(std::string("kcd_ext: ") + what + " for " + shape + ": " + cudaGetErrorString(error) + " (built for " +
                           architectures() + ")");
}

dim3 grid_of(int64_t x, int y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

Shape shape_for(const Problem& p, const Machine& machine) {
  return shape_of(p.rows, p.classes, machine.processors, machine.threads, p.student.type == Type::float64);
}

// ---- selection

// Blocks that share a selection from many rows.
int64_t blocks_over(int64_t rows, const Machine& machine) {
  constexpr int64_t kRowsABlock = 4096;
  const int64_t wanted = rows / kRowsABlock + 1, most = int64_t{machine.processors} * 2;
  return wanted < most ? wanted : most;
}

int threads_over(int64_t rows, const Machine& machine) { return rows > kManyRows ? 3 * machine.threads : machine.threads; }

Selection selection_of(const Keep& keep, uint8_t* selected) { return {keep.fraction, keep.count, selected, nullptr, nullptr}; }

// The first part of the workspace starts as zeros.
size_t take_selection(Selection& selection, int64_t rows, const Machine& machine, Workspace& workspace) {
  if (rows <= kRowsOfOneBlock) return 0;
  selection.state = workspace.take<SelectionState>(1);
  const size_t zeroed = workspace.bytes();
  selection.block_count = workspace.take<unsigned>(blocks_over(rows, machine) * kDigits);
  return zeroed;
}

void select(const Ranking& ranking, const Selection& selection, const Machine& machine) {
  const cudaStream_t stream = stream_of(machine);
  const int64_t rows = ranking.rows;
  const dim3 block(static_cast<unsigned>(threads_over(rows, machine)));
  if (rows <= kRowsOfOneBlock)
    return check(gpu::launch(select_by_one_block, dim3(1), block, 0, stream, ranking, selection), "CUDA kernel select_by_one_block",
                 rows, 0);
  const dim3 grid = grid_of(blocks_over(rows, machine));
  for (int digit = 0; digit < ranking.digits(); ++digit)
    check(gpu::launch(select_digit, grid, block, 0, stream, ranking, selection, digit), "CUDA kernel select_digit", rows, 0);
  check(gpu::launch(select_mark, grid, block, 0, stream, ranking, selection), "CUDA kernel select_mark", rows, 0);
}

struct SelectPlan {
  Ranking ranking;
  Selection selection;
  size_t zeroed;
};

SelectPlan plan(const Select& call, const Machine& machine, Workspace& workspace) {
  SelectPlan plan{{call.value, call.value_is_double, call.candidate, call.rows}, selection_of(call.keep, call.selected), 0};
  plan.zeroed = take_selection(plan.selection, call.rows, machine, workspace);
  return plan;
}

// ---- loss

LossArguments loss_of(const Sum& sum, const void* kl, const void* cross_entropy, const uint8_t* selected, void* loss) {
  return {kl,        cross_entropy, sum.row_weight, selected, sum.kd_factor, sum.ce_weight, sum.reduction,
          sum.ranks, loss,          nullptr,        nullptr};
}

struct ReducePlan {
  unsigned* arrived;
  LossSums* block_sums;
  size_t zeroed;
};

ReducePlan take_reduction(int64_t rows, const Machine& machine, Workspace& workspace) {
  ReducePlan plan{};
  plan.arrived = workspace.take<unsigned>(1);
  plan.zeroed = workspace.bytes();
  plan.block_sums = workspace.take<LossSums>(blocks_over(rows, machine));
  return plan;
}

template <class Real>
void reduce(const Problem& problem, const LossArguments& loss, const ReducePlan& plan, const Machine& machine) {
  const int64_t rows = problem.rows;
  const dim3 grid = grid_of(blocks_over(rows, machine)), block(static_cast<unsigned>(threads_over(rows, machine)));
  check(gpu::launch(reduce_rows<Real>, grid, block, 0, stream_of(machine), problem, loss, plan.block_sums, plan.arrived),
        "CUDA kernel reduce_rows", rows, 0);
}

// ---- forward

template <class Real>
struct ForwardPlan {
  ForwardArguments<Real> arguments;
  Shape shape;
  bool apart;   // whether selection and loss follow in launches of their own
  ReducePlan reduction;
  size_t zeroed;
};

template <class Real>
ForwardPlan<Real> plan(const Forward& call, const Machine& machine, Workspace& workspace) {
  const Problem& p = call.problem;
  ForwardPlan<Real> plan{};
  ForwardArguments<Real>& a = plan.arguments;
  plan.shape = shape_for(p, machine);
  plan.apart = call.loss && (p.rows > kRowsOfOneBlock || p.rows == 0);
  a.problem = p;
  a.outputs = call.outputs;
  a.scale = scale_of<Real>(p.temperature);
  a.row_threads = plan.shape.row_threads;
  a.parts = plan.shape.parts;
  a.with_teacher_entropy = call.outputs.teacher_entropy != nullptr;
  a.value = call.value;
  a.score = call.score;
  a.ranked = call.ranked;
  a.candidate = call.candidate;
  a.with_loss = call.loss && !plan.apart;

  // what starts as zeros
  if (call.loss) a.blocks_arrived = workspace.take<unsigned>(1);
  if (a.parts > 1) a.parts_arrived = workspace.take<unsigned>(p.rows);
  if (call.loss) a.selection = selection_of(call.loss->keep, call.loss->selected);
  if (plan.apart) {
    a.selection.state = workspace.take<SelectionState>(1);
    plan.reduction.arrived = workspace.take<unsigned>(1);
  }
  plan.zeroed = workspace.bytes();

  if (a.parts > 1) a.pieces = workspace.take<RowSums<Real>>(p.rows * a.parts);
  a.ranking = {call.ranked, call.value_is_double, a.candidate, p.rows};
  if (!call.loss) return plan;
  if (!a.candidate) a.ranking.candidate = a.candidate = workspace.take<uint8_t>(p.rows);
  if (p.with_labels && !a.outputs.cross_entropy) a.outputs.cross_entropy = workspace.take<Real>(p.rows);
  if (plan.apart) {
    a.selection.block_count = workspace.take<unsigned>(blocks_over(p.rows, machine) * kDigits);
    plan.reduction.block_sums = workspace.take<LossSums>(blocks_over(p.rows, machine));
  }
  a.loss = loss_of(call.loss->sum, static_cast<const Real*>(call.outputs.stats) + kKl * p.rows, a.outputs.cross_entropy,
                   call.loss->selected, call.loss->loss);
  a.loss.counted = call.loss->counts;
  return plan;
}

template <class Real>
void forward(const Forward& call, const Machine& machine, Workspace workspace) {
  const ForwardPlan<Real> planned = plan<Real>(call, machine, workspace);
  const ForwardArguments<Real>& a = planned.arguments;
  const Problem& p = call.problem;
  const cudaStream_t stream = stream_of(machine);
  if (planned.zeroed > 0) check(gpu::fill(workspace.base(), 0, planned.zeroed, stream), "zeroing the workspace", p.rows, p.classes);
  if (p.rows > 0)
    check(gpu::launch(forward_rows<Real>, grid_of(planned.shape.row_blocks, a.parts),
                      dim3(static_cast<unsigned>(planned.shape.threads)), 0, stream, a),
          "CUDA kernel forward_rows", p.rows, p.classes);
  if (!planned.apart) return;
  if (p.rows > 0) select(a.ranking, a.selection, machine);
  reduce<Real>(p, a.loss, planned.reduction, machine);
}

// ---- backward

template <class Real>
void backward(const Backward& call, const Machine& machine) {
  const Problem& p = call.problem;
  if (p.rows == 0) return;
  const Shape shape = shape_for(p, machine);
  const int threads = machine.threads < shape.threads ? machine.threads : shape.threads, block_rows = threads / shape.row_threads;
  const BackwardArguments<Real> a{p,
                                  scale_of<Real>(p.temperature),
                                  shape.row_threads,
                                  shape.parts,
                                  static_cast<const Real*>(call.stats),
                                  call.selected,
                                  static_cast<const Real*>(call.row_weight),
                                  static_cast<const Real*>(call.grad_output),
                                  call.grad_output_stride,
                                  call.counts,
                                  static_cast<Real>(call.kd_factor),
                                  static_cast<Real>(call.ce_weight),
                                  call.reduction == Reduction::mean,
                                  static_cast<Real>(call.ranks),
                                  call.out};
  check(gpu::launch(backward_rows<Real>, grid_of((p.rows + block_rows - 1) / block_rows, shape.parts),
                    dim3(static_cast<unsigned>(threads)), 0, stream_of(machine), a),
        "CUDA kernel backward_rows", p.rows, p.classes);
}

bool is_double(const Problem& p) { return p.student.type == Type::float64; }

}   // namespace

namespace {
std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }
}   // namespace

std::string version_problem(int driver, int runtime) {
  if (driver / 1000 >= runtime / 1000) return "";
  const std::string found = driver == 0 ? "no NVIDIA driver is there" : "the driver is one for CUDA " + version(driver);
  return "kcd_ext was built by CUDA " + version(runtime) + ", but " + found + ": install a driver for CUDA " +
         std::to_string(runtime / 1000) + ", or build kcd_ext with the nvcc of an older CUDA";
}

#ifdef __CUDACC__
namespace {

const void* const kKernels[] = {
    reinterpret_cast<const void*>(&forward_rows<float>),  reinterpret_cast<const void*>(&forward_rows<double>),
    reinterpret_cast<const void*>(&backward_rows<float>), reinterpret_cast<const void*>(&backward_rows<double>),
    reinterpret_cast<const void*>(&reduce_rows<float>),   reinterpret_cast<const void*>(&reduce_rows<double>),
    reinterpret_cast<const void*>(&select_by_one_block),  reinterpret_cast<const void*>(&select_digit),
    reinterpret_cast<const void*>(&select_mark),          reinterpret_cast<const void*>(&map_rows)};

// What to do where the build holds no code for a device.
std::string advice(int device) {
  int major = 0, minor = 0;
  gpu::returned(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  gpu::returned(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string architecture = std::to_string(major) + std::to_string(minor);
  return ": the device is an sm_" + architecture +
         "; install kcd_ext again with the environment variable CUDAARCHS=" + architecture;
}

// CUDA loads a kernel when it is first asked for.  That is refused while a graph is captured, unless this thread says that it
// knows what it does.
void load_kernels(int device) {
  int driver = 0;
  gpu::returned(cudaDriverGetVersion(&driver));
  const std::string problem = version_problem(driver, CUDART_VERSION);
  if (!problem.empty()) throw std::runtime_error(problem);
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  gpu::returned(cudaThreadExchangeStreamCaptureMode(&mode));
  cudaError_t error = cudaSuccess;
  for (const void* kernel : kKernels) {
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = gpu::returned(cudaFuncGetAttributes(&attributes, kernel));
  }
  gpu::returned(cudaThreadExchangeStreamCaptureMode(&mode));
  if (error != cudaSuccess)
    throw std::runtime_error("kcd_ext: the kernels cannot be loaded on CUDA device " + std::to_string(device) + ": " +
                             cudaGetErrorString(error) + " (built by CUDA " + version(CUDART_VERSION) + " for " + architectures() +
                             "; the driver is one for CUDA " + version(driver) + ")" +
                             (error == cudaErrorNoKernelImageForDevice ? advice(device) : ""));
}

void load_kernels_once(int device) {
  constexpr int kDevices = 64;   // of a process; of more than that, each call looks whether all is loaded
  static std::once_flag loaded[kDevices];
  if (device < kDevices)
    std::call_once(loaded[device], load_kernels, device);
  else
    load_kernels(device);
}

}   // namespace

Machine machine_of(int device, void* stream) {
  load_kernels_once(device);
  int processors = 0;
  const cudaError_t error = gpu::returned(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (error != cudaSuccess)
    throw std::runtime_error("kcd_ext: CUDA device " + std::to_string(device) + " does not answer: " + cudaGetErrorString(error));
  return {processors, stream, kThreads};
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

size_t workspace_of(const Forward& call, const Machine& machine) {
  Workspace workspace(nullptr);
  is_double(call.problem) ? (void)plan<double>(call, machine, workspace) : (void)plan<float>(call, machine, workspace);
  return workspace.bytes();
}

size_t workspace_of(const Select& call, const Machine& machine) {
  Workspace workspace(nullptr);
  plan(call, machine, workspace);
  return workspace.bytes();
}

size_t workspace_of(const Reduce& call, const Machine& machine) {
  Workspace workspace(nullptr);
  take_reduction(call.problem.rows, machine, workspace);
  return workspace.bytes();
}

void forward(const Forward& call, const Machine& machine, void* workspace) {
  is_double(call.problem) ? forward<double>(call, machine, Workspace(workspace))
                          : forward<float>(call, machine, Workspace(workspace));
}

void backward(const Backward& call, const Machine& machine) {
  is_double(call.problem) ? backward<double>(call, machine) : backward<float>(call, machine);
}

void select(const Select& call, const Machine& machine, void* memory) {
  if (call.rows == 0) return;
  Workspace workspace(memory);
  const SelectPlan planned = plan(call, machine, workspace);
  if (planned.zeroed > 0) check(gpu::fill(memory, 0, planned.zeroed, stream_of(machine)), "zeroing the workspace", call.rows, 0);
  select(planned.ranking, planned.selection, machine);
}

void reduce(const Reduce& call, const Machine& machine, void* memory) {
  Workspace workspace(memory);
  const ReducePlan planned = take_reduction(call.problem.rows, machine, workspace);
  check(gpu::fill(memory, 0, planned.zeroed, stream_of(machine)), "zeroing the workspace", call.problem.rows, 0);
  LossArguments loss = loss_of(call.sum, call.kl, call.cross_entropy, call.selected, call.loss);
  loss.counts = call.counts;
  is_double(call.problem) ? reduce<double>(call.problem, loss, planned, machine)
                          : reduce<float>(call.problem, loss, planned, machine);
}

void clear(const State& state, const Machine& machine) {
  const auto bytes = static_cast<size_t>(state.bytes());
  check(gpu::fill(state.data, 0, bytes, stream_of(machine)), "clearing the state", state.rows, 0);
}

void map_teacher_rows(const int64_t* rows, int64_t n, int64_t* teacher_row, int64_t student_rows, const Machine& machine) {
  const cudaStream_t stream = stream_of(machine);
  if (student_rows == 0) return;
  check(gpu::fill(teacher_row, 0xff, static_cast<size_t>(student_rows) * sizeof(int64_t), stream), "marking rows as not named",
        student_rows, 0);
  if (n == 0) return;
  const unsigned threads = static_cast<unsigned>(machine.threads);
  check(gpu::launch(map_rows, grid_of((n + threads - 1) / threads), dim3(threads), 0, stream, rows, n, teacher_row, student_rows),
        "CUDA kernel map_rows", student_rows, 0);
}

}   // namespace kcd::cuda
