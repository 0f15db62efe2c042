// The only header through which kernels use CUDA.  With any other compiler simt.h replaces CUDA and executes the kernels on the CPU
// (python_tests/simt).  For that, kernels declare shared memory with SHARED, are launched by gpu::launch, and have a plain C++
// version beside all code that needs __CUDA_ARCH__.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define SHARED(T, name, n) __shared__ T name[n]

namespace gpu {

// Returns `error`, and clears it from the runtime, so that no later call reports it.
inline cudaError_t clear_error(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <class... Parameters, class... Given>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Given&... given) {
  return [&](Parameters... parameters) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    return clear_error(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream));
  }(static_cast<Parameters>(given)...);
}

inline cudaError_t fill(void* data, int byte, size_t bytes, cudaStream_t stream) {
  return clear_error(cudaMemsetAsync(data, byte, bytes, stream));
}

}   // namespace gpu
#else
#include "simt.h"
#endif

#define KCD_DEVICE static __device__ __forceinline__
#define KCD_DEVICE_MEMBER __device__ __forceinline__

namespace kcd::cuda {

constexpr int kWarp = 32;

// Reads threadIdx.x again at each call, so that values derived from it need no registers across a long loop.
KCD_DEVICE int thread_index() {
#ifdef __CUDA_ARCH__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// 2^x in one instruction of the special function unit, within 2 ulp; subnormal results are flushed to 0.  Volatile: otherwise the
// compiler computes some of them both before a branch and after it.
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

// The larger of two numbers; if one is NaN, the other.
KCD_DEVICE float max_number(float a, float b) {
#ifdef __CUDA_ARCH__
  return ::fmaxf(a, b);
#else
  return __builtin_fmaxf(a, b);
#endif
}
KCD_DEVICE double max_number(double a, double b) {
#ifdef __CUDA_ARCH__
  return ::fmax(a, b);
#else
  return __builtin_fmax(a, b);
#endif
}

}   // namespace kcd::cuda
