// Runs CUDA C++ kernels on the CPU, without a GPU or a CUDA toolkit.  Each CUDA thread is a fiber; a launch runs on one OS thread.
//
// This tests correctness, not speed.  It checks the rules of barriers and warp collectives itself, memory (including shared memory)
// with AddressSanitizer, and races between CUDA threads with ThreadSanitizer (see simt.cpp).  It models neither caches nor weak
// memory nor the device's arithmetic: exponentials and logarithms are the host's.
//
// Kernel sources differ from plain CUDA in three ways: static shared arrays are SHARED(T, name, N), dynamic shared memory is
// DYN_SHARED(T, name), and launches are gpu::launch(kernel, grid, block, shared_bytes, stream, arguments...).
#pragma once
#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ---- keywords
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static_assert(false, "write SHARED(T, name, N) or DYN_SHARED(T, name)");

// ---- types, with CUDA's alignments, so that UBSan detects misaligned vector loads
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999,
};
const char* cudaGetErrorString(cudaError_t error);   // a failed launch: simt::last_error()

constexpr int warpSize = 32;

namespace simt {

// ---- for tests

enum class Order { forward, reverse, random };

// Sets the schedule of later launches.  forward, reverse: one block after another, its threads in ascending or descending order,
// each until it must wait.  random: `resident_blocks` (up to 16) blocks at a time, any of their threads next, with preemption at
// atomics and fences; the same seed and launches give the same order.  A correct kernel computes the same with every schedule.
void configure(Order order, unsigned seed = 1, int resident_blocks = 1);

// The error of the latest launch, or "".  Valid until the next launch.
const char* last_error();

// Aborts the running launch, which returns cudaErrorLaunchFailure; last_error() is then this text and the calling thread's index.
// Throws std::logic_error outside a kernel.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// ---- the implementation of the CUDA names below

struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Operation {
  shuffle_xor,
  shuffle_down,
  shuffle_up,
  shuffle_index,
  any,
  all,
  ballot,
  reduce_add,
  reduce_min,
  reduce_max,
  reduce_and,
  reduce_or,
  reduce_xor,
  syncwarp,
  syncthreads,
  syncthreads_count,
  syncthreads_and,
  syncthreads_or,
};

struct Coordinates {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
};
extern __thread Coordinates* current;   // of the running CUDA thread; null outside a kernel

[[noreturn]] void outside_kernel();
inline const Coordinates& coordinates() {
  if (!current) outside_kernel();
  return *current;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*run_thread)(void*), void* argument);
int barrier(Operation operation, bool predicate, Location location);
// Waits for the lanes of `mask`.  Returns `value` of lane `source`, or if that is negative, the operation's result over all values.
uint64_t collective(Operation operation, unsigned mask, uint64_t value, int source, Location location);
int source_lane(Operation operation, unsigned argument, int width, Location location);
void* static_shared(const void* key, size_t bytes);
void* dynamic_shared();
void fence();
void before_atomic();
void after_atomic(const void* address);

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<From>);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T shuffle(Operation operation, unsigned mask, T value, unsigned argument, int width, Location location) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves 8 bytes at most");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = collective(operation, mask, word, source_lane(operation, argument, width, location), location);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline unsigned vote(Operation operation, unsigned mask, uint64_t value, Location location) {
  return static_cast<unsigned>(collective(operation, mask, value, -1, location));
}

// The type of a lambda, `Site`, differs for every SHARED and every template instance around it; so does the address of `key`.
template <class T, size_t count, class Site>
inline T (&static_shared_array(Site)) [count] {
  static_assert(alignof(T) <= 16);
  static const char key = 0;
  return *static_cast<T(*)[count]>(static_shared(&key, sizeof(T[count])));
}

template <class T>
struct Same {
  using Type = T;
};
template <class T>   // for parameters: T is deduced from the other parameters
using NotDeduced = typename Same<T>::Type;

template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
inline T wrapping_add(T a, T b) {   // as the device does; on the host a signed overflow is undefined
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
  else
    return a + b;
}

// Relaxed, as CUDA's atomics are.  Accepts only the types that CUDA accepts, so that no kernel compiles only here.
template <class... Allowed, class T, class Function>
inline T read_modify_write(T* address, Function function) {
  static_assert(is_one_of<T, Allowed...>, "CUDA has no such atomic for this type (64 bits: unsigned long long)");
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  before_atomic();
  Word* const word = reinterpret_cast<Word*>(address);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, bit_cast<Word>(static_cast<T>(function(bit_cast<T>(old)))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return bit_cast<T>(old);
}

}   // namespace simt

// ---- built-in variables, shared memory
#define threadIdx (::simt::coordinates().thread_index)
#define blockIdx (::simt::coordinates().block_index)
#define blockDim (::simt::coordinates().block_size)
#define gridDim (::simt::coordinates().grid_size)
#define SHARED(T, name, ...) T(&name)[__VA_ARGS__] = ::simt::static_shared_array<T, (__VA_ARGS__)>([] {})
#define DYN_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())

// ---- barriers
#define SIMT_HERE ::simt::Location location = ::simt::Location::here()

inline void __syncthreads(SIMT_HERE) { simt::barrier(simt::Operation::syncthreads, false, location); }
inline int __syncthreads_count(int predicate, SIMT_HERE) {
  return simt::barrier(simt::Operation::syncthreads_count, predicate, location);
}
inline int __syncthreads_and(int predicate, SIMT_HERE) {
  return simt::barrier(simt::Operation::syncthreads_and, predicate, location);
}
inline int __syncthreads_or(int predicate, SIMT_HERE) {
  return simt::barrier(simt::Operation::syncthreads_or, predicate, location);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) { simt::vote(simt::Operation::syncwarp, mask, 0, location); }

// ---- fences.  __threadfence_block orders nothing here, which is stricter than CUDA.
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() {}

// ---- collectives of a warp
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, SIMT_HERE) {
  return simt::shuffle(simt::Operation::shuffle_xor, mask, value, static_cast<unsigned>(lane_mask), width, location);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_HERE) {
  return simt::shuffle(simt::Operation::shuffle_down, mask, value, delta, width, location);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_HERE) {
  return simt::shuffle(simt::Operation::shuffle_up, mask, value, delta, width, location);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, SIMT_HERE) {
  return simt::shuffle(simt::Operation::shuffle_index, mask, value, static_cast<unsigned>(lane), width, location);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::vote(simt::Operation::any, mask, predicate != 0, location) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::vote(simt::Operation::all, mask, predicate != 0, location) != 0;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::vote(simt::Operation::ballot, mask, predicate != 0, location);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return simt::vote(simt::Operation::reduce_add, mask, value, location);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return simt::vote(simt::Operation::reduce_min, mask, value, location);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return simt::vote(simt::Operation::reduce_max, mask, value, location);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return simt::vote(simt::Operation::reduce_and, mask, value, location);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return simt::vote(simt::Operation::reduce_or, mask, value, location);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SIMT_HERE) {
  return simt::vote(simt::Operation::reduce_xor, mask, value, location);
}
#undef SIMT_HERE

// ---- atomics; each returns the old value
template <class T>
inline T atomicAdd(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, unsigned long long, float, double>(
      address, [=](T old) { return simt::wrapping_add(old, value); });
}
template <class T>
inline T atomicSub(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned>(address,
                                                [=](T old) { return simt::wrapping_add(old, simt::wrapping_add<T>(~value, 1)); });
}
template <class T>
inline T atomicMin(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, long long, unsigned long long>(address,
                                                                               [=](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicMax(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, long long, unsigned long long>(address,
                                                                               [=](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicAnd(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, unsigned long long>(address, [=](T old) { return old & value; });
}
template <class T>
inline T atomicOr(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, unsigned long long>(address, [=](T old) { return old | value; });
}
template <class T>
inline T atomicXor(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, unsigned long long>(address, [=](T old) { return old ^ value; });
}
template <class T>
inline T atomicExch(T* address, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, unsigned long long, float>(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, simt::NotDeduced<T> expected, simt::NotDeduced<T> value) {
  return simt::read_modify_write<int, unsigned, unsigned long long>(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return simt::read_modify_write<unsigned>(address, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---- loads and stores with cache hints
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline void __stcs(T* address, simt::NotDeduced<T> value) {
  *address = value;
}

// ---- bits
inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bit_cast<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

// ---- arithmetic
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return std::fmin(x, y);   // as on the device: a number wins over NaN
  return y < x ? y : x;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return std::fmax(x, y);
  return x < y ? y : x;
}

// ---- host functions
namespace gpu {

// Runs immediately; ignores the stream.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                          Arguments&&... arguments) {
  auto run_thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return simt::launch(grid, block, shared_bytes, [](void* run) { (*static_cast<decltype(run_thread)*>(run))(); }, &run_thread);
}

inline cudaError_t fill(void* pointer, int byte, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  if (!pointer) return cudaErrorInvalidValue;
  std::memset(pointer, byte, bytes);
  return cudaSuccess;
}

}   // namespace gpu
