// The only header by which a kernel reaches CUDA.  Under any other compiler simt.h takes CUDA's place, which executes kernels on
// the CPU for tests (python_tests/simt).  So that both can compile a kernel, it declares shared memory by SHARED, is launched by
// gpu::launch, and keeps what only a GPU knows behind __CUDA_ARCH__, beside plain C++ that does the same.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define SHARED(T, name, n) __shared__ T name[n]

namespace gpu {

// What goes wrong is returned, and not left behind for whoever asks the runtime for its last error next.
inline cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <class... Parameters, class... Given>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Given&... given) {
  return [&](Parameters... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    return returned(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream));
  }(static_cast<Parameters>(given)...);
}

inline cudaError_t fill(void* data, int byte, size_t bytes, cudaStream_t stream) {
  return returned(cudaMemsetAsync(data, byte, bytes, stream));
}

}   // namespace gpu
#else
#include "simt.h"
#endif

#define KCD_DEVICE static __device__ __forceinline__
#define KCD_DEVICE_MEMBER __device__ __forceinline__

namespace kcd::cuda {

constexpr int kWarp = 32;

// threadIdx.x, read anew at each call: what a kernel derives from it need not be kept in registers over a long loop.
KCD_DEVICE int thread_index() {
#ifdef __CUDA_ARCH__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// 2^x, one instruction of the special function unit (two units in the last place); what would be subnormal is 0.  Volatile, for
// else the compiler computes some before a branch and again behind it.
KCD_DEVICE float exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = __builtin_exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}
KCD_DEVICE double exp2(double x) {
#ifdef __CUDA_ARCH__
  return ::exp2(x);
#else
  return __builtin_exp2(x);
#endif
}

// The greater of two numbers; of a number and NaN the number.
KCD_DEVICE float greater_of(float a, float b) {
#ifdef __CUDA_ARCH__
  return ::fmaxf(a, b);
#else
  return __builtin_fmaxf(a, b);
#endif
}
KCD_DEVICE double greater_of(double a, double b) {
#ifdef __CUDA_ARCH__
  return ::fmax(a, b);
#else
  return __builtin_fmax(a, b);
#endif
}

}   // namespace kcd::cuda
