// Tests of the shim, by case name: the semantics of each primitive, and the detection of misuse.
//
// Exit status: 0 on success; kFailedLaunch if a launch failed (message on stderr); kWrong for a wrong result; otherwise a
// sanitizer's.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "simt.h"

namespace {

constexpr int kFailedLaunch = 86, kWrong = 10;
constexpr unsigned kAll = 0xffffffffu;

#define CHECK(condition) \
  if (!(condition)) simt::fail("CHECK %s at line %d", #condition, __LINE__)
#define EXPECT(condition) \
  if (!(condition)) wrong(#condition, __LINE__)

[[noreturn]] void wrong(const char* condition, int line) {
  std::fprintf(stderr, "wrong: %s at line %d; last error: %s\n", condition, line, simt::last_error());
  std::exit(kWrong);
}

template <class Kernel, class... Arguments>
void run(Kernel kernel, dim3 grid, dim3 block, Arguments... arguments) {
  if (gpu::launch(kernel, grid, block, 0, nullptr, arguments...) == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", simt::last_error());
  std::exit(kFailedLaunch);
}

// ---- semantics of the primitives

__global__ void collectives() {
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
  CHECK(__shfl_down_sync(kAll, thread, 3) == (lane < 29 ? thread + 3 : thread));
  CHECK(__shfl_up_sync(kAll, thread, 2) == (lane >= 2 ? thread - 2 : thread));
  CHECK(__shfl_xor_sync(kAll, thread, 5) == (thread ^ 5));
  CHECK(__shfl_sync(kAll, thread, 7, 16) == (thread & ~15) + 7);
  CHECK(__shfl_down_sync(kAll, thread, 1, 8) == ((lane & 7) < 7 ? thread + 1 : thread));
  CHECK(__shfl_xor_sync(kAll, static_cast<double>(thread), 1) == (thread ^ 1));
  CHECK(__ballot_sync(kAll, thread % 2) == 0xaaaaaaaau);
  CHECK(__any_sync(kAll, lane == 3) && !__any_sync(kAll, 0));
  CHECK(__all_sync(kAll, 2) && !__all_sync(kAll, lane == 3));
  const unsigned value = static_cast<unsigned>(lane) + 1;
  CHECK(__reduce_add_sync(kAll, value) == 528 && __reduce_max_sync(kAll, value) == 32 && __reduce_min_sync(kAll, value) == 1);
  CHECK(__reduce_and_sync(kAll, value) == 0 && __reduce_or_sync(kAll, value) == 63 && __reduce_xor_sync(kAll, value) == 32);
  // Two groups of one warp at the same time.
  if (lane < 16) {
    CHECK(__shfl_xor_sync(0x0000ffffu, thread, 1) == (thread ^ 1));
    CHECK(__reduce_add_sync(0x0000ffffu, 1u) == 16);
  } else {
    CHECK(__shfl_xor_sync(0xffff0000u, thread, 1) == (thread ^ 1));
    CHECK(__all_sync(0xffff0000u, lane >= 16));
  }
}

__global__ void barriers(int* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  CHECK(__syncthreads_count(thread % 3 == 0) == static_cast<int>((blockDim.x + 2) / 3));
  CHECK(__syncthreads_or(thread == 5));
  CHECK(!__syncthreads_and(thread == 5));
  SHARED(int, first, 64);
  SHARED(int, second, 64);
  DYN_SHARED(int, third);
  CHECK(&first != &second && sizeof(first) == 256 && first[thread] == -1 && third[thread] == -1);
  first[thread] = thread;
  __syncthreads();
  second[thread] = first[63 - thread];
  third[thread] = thread;
  __syncthreads();
  CHECK(second[thread] == 63 - thread && third[thread ^ 1] == (thread ^ 1));
  atomicAdd(sums, 1);
  atomicMax(sums + 1, thread);
  atomicOr(sums + 2, 1 << (thread & 15));
  atomicAdd(reinterpret_cast<float*>(sums + 3), 0.5f);
}

__global__ void coordinates(unsigned* out) {
  CHECK(blockDim.x == 4 && blockDim.y == 3 && blockDim.z == 2 && gridDim.x == 2 && gridDim.y == 2 && gridDim.z == 3);
  const unsigned block = blockIdx.x + 2 * (blockIdx.y + 2 * blockIdx.z);
  const unsigned thread = threadIdx.x + 4 * (threadIdx.y + 3 * threadIdx.z);
  out[block * 24 + thread] = block * 24 + thread;
}

void semantics() {
  for (simt::Order order : {simt::Order::forward, simt::Order::reverse, simt::Order::random}) {
    for (unsigned seed = 0; seed < (order == simt::Order::random ? 10 : 1); ++seed) {
      simt::configure(order, seed, 1 + static_cast<int>(seed % 3));
      run(collectives, 1, 64);
      int sums[4] = {};
      EXPECT(gpu::launch(barriers, dim3(3), dim3(64), 256, nullptr, sums) == cudaSuccess);
      EXPECT(sums[0] == 192 && sums[1] == 63 && sums[2] == 0xffff && __int_as_float(sums[3]) == 96.0f);
      unsigned out[288] = {};
      run(coordinates, dim3(2, 2, 3), dim3(4, 3, 2), out);
      for (unsigned i = 0; i < 288; ++i) EXPECT(out[i] == i);
    }
  }
}

struct Atomics {
  unsigned long long sum, least, greatest, bits, cleared, exchanged, compared;
  long long least_signed;
  double real;
  int wrapped, below;
  unsigned cycle, toggled;
};

__global__ void all_atomics(Atomics* a) {
  const unsigned long long thread = threadIdx.x, large = (thread + 1) << 32;
  atomicAdd(&a->sum, large);
  atomicMin(&a->least, large);
  atomicMax(&a->greatest, large);
  atomicMin(&a->least_signed, -static_cast<long long>(large));
  atomicOr(&a->bits, 1ull << thread);
  atomicAnd(&a->cleared, ~(1ull << thread));
  CHECK((atomicExch(&a->exchanged, large) & 0xffffffffu) == 0);
  atomicCAS(&a->compared, large, large + (1ull << 32));   // in ascending order each succeeds
  atomicAdd(&a->real, 0.25);
  atomicAdd(&a->wrapped, 0x7fffffff);
  atomicSub(&a->below, 1);
  atomicInc(&a->cycle, 9);
  atomicXor(&a->toggled, 1u << (thread % 16));
}

void atomics() {
  Atomics a{};
  a.least = a.cleared = ~0ull;
  a.compared = 1ull << 32;
  run(all_atomics, 1, 64, &a);
  EXPECT(a.sum == 2080ull << 32 && a.least == 1ull << 32 && a.greatest == 64ull << 32 && a.least_signed == -(64ll << 32));
  EXPECT(a.bits == ~0ull && a.cleared == 0 && a.exchanged == 64ull << 32 && a.compared == 65ull << 32);
  EXPECT(a.real == 16.0 && a.wrapped == -64 && a.below == -64 && a.cycle == 4 && a.toggled == 0);
}

__global__ void read_fresh_shared(float* out) {
  SHARED(float, fresh, 4);
  DYN_SHARED(float, dynamic);
  out[0] = fresh[0];
  out[1] = dynamic[0];
}

void fresh_shared_is_poisoned() {
  float out[2] = {};
  EXPECT(gpu::launch(read_fresh_shared, dim3(1), dim3(1), 4, nullptr, out) == cudaSuccess);
  EXPECT(std::isnan(out[0]) && std::isnan(out[1]));
}

void host_side() {
  alignas(16) unsigned char bytes[8] = {};
  EXPECT(gpu::fill(bytes, 3, sizeof bytes, nullptr) == cudaSuccess && bytes[7] == 3);
  EXPECT(gpu::fill(nullptr, 3, 1, nullptr) == cudaErrorInvalidValue && gpu::fill(nullptr, 3, 0, nullptr) == cudaSuccess);
  EXPECT(std::string(cudaGetErrorString(cudaErrorInvalidValue)) == "invalid argument");
  EXPECT(alignof(uint4) == 16 && sizeof(uint4) == 16 && sizeof(uint3) == 12 && __popc(7) == 3 && __popcll(7ull << 40) == 3);
  EXPECT(__clz(1) == 31 && __clz(0) == 32 && __clzll(1) == 63 && __ffs(8) == 4 && __ffs(0) == 0 && __ffsll(1ll << 40) == 41);
  EXPECT(min(3, 4u) == 3u && max(3, 4) == 4 && max(NAN, 1.0f) == 1.0f && __float_as_uint(1.0f) == 0x3f800000u);
  bool thrown = false;
  try {
    __syncthreads();
  } catch (const std::exception&) {
    thrown = true;
  }
  EXPECT(thrown);
}

__global__ void nothing() {}

void limits() {
  const auto refuses = [](dim3 grid, dim3 block, size_t shared_bytes) {
    return gpu::launch(nothing, grid, block, shared_bytes, nullptr) == cudaErrorInvalidConfiguration && *simt::last_error();
  };
  EXPECT(refuses(0, 32, 0) && refuses(dim3(1, 65536), 32, 0) && refuses(dim3(1, 1, 65536), 32, 0) && refuses(1u << 31, 32, 0));
  EXPECT(refuses(1, 0, 0) && refuses(1, 1025, 0) && refuses(1, dim3(32, 33), 0) && refuses(1, dim3(1, 1, 65), 0));
  EXPECT(refuses(1, dim3(1u << 31, 2), 0) && refuses(1, 32, (227 << 10) + 1));
  EXPECT(gpu::launch(nothing, dim3(1), dim3(1024), 227 << 10, nullptr) == cudaSuccess && !*simt::last_error());
}

// ---- schedules

__global__ void sum_in_tiers(const int* data, int* sum, int count) {
  SHARED(int, partial, 2);
  int own = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(count); i += gridDim.x * blockDim.x)
    own += data[i];
  for (int distance = 16; distance; distance /= 2) own += __shfl_xor_sync(kAll, own, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(sum, partial[0] + partial[1]);
}

void schedules_agree() {
  std::vector<int> data(1000);
  for (int i = 0; i < 1000; ++i) data[static_cast<size_t>(i)] = i;
  for (simt::Order order : {simt::Order::forward, simt::Order::reverse, simt::Order::random}) {
    for (int seed = 0; seed < 5; ++seed) {
      simt::configure(order, static_cast<unsigned>(seed), 1 + seed);
      int sum = 0;
      run(sum_in_tiers, 3, 64, data.data(), &sum, 1000);
      EXPECT(sum == 499500);
    }
  }
}

__global__ void take_tickets(unsigned* counter, unsigned* ticket) {
  ticket[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1u);
}

std::vector<unsigned> tickets(simt::Order order, unsigned seed) {
  simt::configure(order, seed, 2);
  std::vector<unsigned> ticket(192);
  unsigned counter = 0;
  run(take_tickets, 3, 64, &counter, ticket.data());
  return ticket;
}

void seed_determines_schedule() {
  const auto forward = tickets(simt::Order::forward, 1), reverse = tickets(simt::Order::reverse, 1);
  for (unsigned i = 0; i < 192; ++i) EXPECT(forward[i] == i && reverse[i] == 191 - i);
  EXPECT(tickets(simt::Order::random, 5) == tickets(simt::Order::random, 5));
  EXPECT(tickets(simt::Order::random, 5) != tickets(simt::Order::random, 6));
}

__global__ void wait_for_the_other_block(int* flag) {
  if (blockIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) {
    }
  } else {
    atomicExch(flag, 1);
  }
}

void resident_blocks_interleave() {
  simt::configure(simt::Order::random, 1, 2);
  int flag = 0;
  run(wait_for_the_other_block, 2, 32, &flag);
}

__global__ void count_blocks(unsigned long long* count) {
  if (threadIdx.x == 0) atomicAdd(count, 1ull);
}

void huge_grid() {
  unsigned long long count = 0;
  run(count_blocks, 100000, 32, &count);
  EXPECT(count == 100000);
}

void host_threads() {
  int sums[4] = {};
  std::vector<std::thread> threads;
  for (int& sum : sums) {
    threads.emplace_back([&sum] {
      const std::vector<int> data(100, 1);
      for (int i = 0; i < 5; ++i) run(sum_in_tiers, 1, 64, data.data(), &sum, 100);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int sum : sums) EXPECT(sum == 500);
}

// ---- launches that fail

__global__ void early_exit() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads_or(0);
  }
}
__global__ void all_lanes() { __shfl_xor_sync(kAll, 1, 1); }
__global__ void lane_outside_mask() { __shfl_sync(0x1u, 1, 1); }
__global__ void caller_outside_mask() { __any_sync(0x1u, 1); }
__global__ void odd_width() { __shfl_sync(kAll, 1, 1, 12); }
__global__ void missing_lane() {
  if (threadIdx.x != 7) __syncwarp();
}
__global__ void too_much_static() {
  SHARED(char, fits, 40000);
  SHARED(char, does_not, 10000);
  fits[0] = does_not[0] = 0;
}
__global__ void launch_inside() { gpu::launch(nothing, dim3(1), dim3(1), 0, nullptr); }

// Leaves frames on every stack.
__global__ void fail_in_depth(int failing) {
  volatile int local[100];
  for (int& x : reinterpret_cast<int (&)[100]>(const_cast<int (&)[100]>(local))) x = 1;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) == failing) simt::fail("on purpose, %d", local[99]);
  __syncthreads();
}

void failures_then_success() {
  const auto fails = [](auto kernel, unsigned threads, auto... arguments) {
    return gpu::launch(kernel, dim3(3), dim3(threads), 0, nullptr, arguments...) == cudaErrorLaunchFailure && *simt::last_error();
  };
  for (simt::Order order : {simt::Order::forward, simt::Order::reverse, simt::Order::random}) {
    simt::configure(order, 1, 2);
    for (int failing : {0, 20, 63}) {
      EXPECT(fails(fail_in_depth, 64, failing));
      EXPECT(std::string(cudaGetErrorString(cudaErrorLaunchFailure)).find("on purpose, 1 [block (") == 0);
      EXPECT(fails(early_exit, 64) && fails(all_lanes, 20));
      run(fail_in_depth, 3, 64, -1);
      EXPECT(!*simt::last_error());
      run(collectives, 1, 64);
    }
  }
}

// ---- memory errors, for AddressSanitizer and UBSan

__global__ void write_static(int at) {
  SHARED(int, data, 8);
  int* const unchecked = data;
  unchecked[at] = 1;
}
__global__ void write_dynamic(int at) {
  DYN_SHARED(int, data);
  data[at] = 1;
}
__global__ void read_vector(const float* data, float* out) { *out = reinterpret_cast<const uint4*>(data)->x != 0; }

__global__ void keep_address(uintptr_t* kept) {
  volatile int local = 7;
  if (threadIdx.x == 0) *kept = reinterpret_cast<uintptr_t>(&local);
}
__global__ void read_address(const uintptr_t* kept, int* out) { *out = *reinterpret_cast<const volatile int*>(*kept); }

void ended_stack() {   // one thread leaves at least 63 stacks in the pool
  for (unsigned i = 0; i < 2; ++i) {
    simt::configure(i ? simt::Order::forward : simt::Order::reverse);
    uintptr_t kept = 0;
    int out = 0;
    run(keep_address, 1, 64, &kept);
    run(read_address, 1, 1, &kept, &out);
  }
}

void stack_reuse() {
  for (int i = 0; i < 20; ++i) {
    run(fail_in_depth, 2, 128, -1);
    EXPECT(gpu::launch(fail_in_depth, dim3(2), dim3(128), 0, nullptr, i) == cudaErrorLaunchFailure);
    run(sum_in_tiers, 2, 64, &i, &i, 0);
  }
}

// ---- races, for ThreadSanitizer

__global__ void exchange_in_warp(int* out, bool synchronise) {
  SHARED(int, data, 32);
  data[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (synchronise)
    __syncwarp();
  else
    __shfl_xor_sync(kAll, 0, 1);   // does not order memory
  out[threadIdx.x] = data[threadIdx.x ^ 1];
}

void exchange(bool synchronise) {
  int out[32];
  run(exchange_in_warp, 1, 32, out, synchronise);
}

// Ascending order hides the missing barrier.
__global__ void last_reads_first(int* out) {
  SHARED(int, data, 1);
  if (threadIdx.x == 0) data[0] = 7;
  if (threadIdx.x == blockDim.x - 1) out[0] = data[0];
}

void missing_barrier(simt::Order order) {
  simt::configure(order);
  int out = 0;
  run(last_reads_first, 1, 64, &out);
  EXPECT(out == 7);
}

enum Fault { no_fault, no_release, no_acquire, plain_reset, plain_count };

// Each block writes its part; the last one to take a ticket sums them all.
__global__ void last_block_adds(int* part, unsigned* ticket, int* sum, Fault fault) {
  SHARED(bool, last, 1);
  if (threadIdx.x == 0) {
    part[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    if (fault != no_release) __threadfence();
    last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (fault != no_acquire) __threadfence();
  }
  __syncthreads();
  if (!last[0]) return;
  if (threadIdx.x < gridDim.x) {
    if (fault == plain_count)
      *sum += part[threadIdx.x];
    else
      atomicAdd(sum, part[threadIdx.x]);
  }
  if (threadIdx.x == 0) {
    if (fault == plain_reset)
      *ticket = 0;
    else
      atomicExch(ticket, 0u);
  }
}

// TSan remembers four accesses per eight bytes; neighbours would evict the ones that matter.
template <class T>
struct alignas(64) OwnCacheLine {
  T value{};
};

void last_block(Fault fault) {
  for (unsigned seed = 0; seed < 3; ++seed) {
    simt::configure(simt::Order::random, seed, 3);
    int part[3] = {};
    OwnCacheLine<int> sum;
    OwnCacheLine<unsigned> ticket;
    run(last_block_adds, 3, 32, part, &ticket.value, &sum.value, fault);
    EXPECT(sum.value == 6 && ticket.value == 0);
  }
}

const std::map<std::string, std::function<void()>> kCases = {
    {"semantics", semantics},
    {"atomics", atomics},
    {"fresh_shared_is_poisoned", fresh_shared_is_poisoned},
    {"host_side", host_side},
    {"limits", limits},
    {"schedules_agree", schedules_agree},
    {"seed_determines_schedule", seed_determines_schedule},
    {"resident_blocks_interleave", resident_blocks_interleave},
    {"huge_grid", huge_grid},
    {"host_threads", host_threads},
    {"failures_then_success", failures_then_success},
    {"stack_reuse", stack_reuse},
    {"early_exit", [] { run(early_exit, 1, 64); }},
    {"two_barriers", [] { run(two_barriers, 1, 64); }},
    {"partial_warp", [] { run(all_lanes, 1, 20); }},
    {"lane_outside_mask", [] { run(lane_outside_mask, 1, 1); }},
    {"caller_outside_mask", [] { run(caller_outside_mask, 1, 2); }},
    {"odd_width", [] { run(odd_width, 1, 32); }},
    {"missing_lane", [] { run(missing_lane, 1, 32); }},
    {"too_much_static", [] { run(too_much_static, 1, 32); }},
    {"launch_inside", [] { run(launch_inside, 1, 32); }},
    {"static_within", [] { run(write_static, 1, 1, 7); }},
    {"static_overrun", [] { run(write_static, 1, 1, 8); }},
    {"dynamic_overrun", [] { gpu::launch(write_dynamic, dim3(1), dim3(1), 32, nullptr, 8); }},
    {"misaligned_vector",
     [] {
       alignas(16) float data[8] = {};
       run(read_vector, 1, 1, data + 1, data);
     }},
    {"ended_stack", ended_stack},
    {"syncwarp", [] { exchange(true); }},
    {"syncwarp_missing", [] { exchange(false); }},
    {"missing_barrier_forward", [] { missing_barrier(simt::Order::forward); }},
    {"missing_barrier_reverse", [] { missing_barrier(simt::Order::reverse); }},
    {"last_block", [] { last_block(no_fault); }},
    {"last_block_no_release", [] { last_block(no_release); }},
    {"last_block_no_acquire", [] { last_block(no_acquire); }},
    {"last_block_plain_reset", [] { last_block(plain_reset); }},
    {"last_block_plain_count", [] { last_block(plain_count); }},
};

}   // namespace

int main(int count, char** arguments) {
  const auto found = kCases.find(count > 1 ? arguments[1] : "");
  if (found == kCases.end()) return 2;
  found->second();
}
