// The instruction sets that row_stats.cpp and condensed_kd_backward.cpp are compiled for, each in a namespace of its name.
#pragma once
#include "kernels.h"

// KCD_INSTRUCTION_SETS(X) expands to X(namespace, name in KCD_ISA, whether this processor supports it), best first.
#if defined(__x86_64__)
#define KCD_INSTRUCTION_SETS(X)                                                                                      \
  X(avx512, "avx512",                                                                                                \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && \
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))       \
  X(avx2, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) \
  X(baseline, "baseline", true)
#else
#define KCD_INSTRUCTION_SETS(X) X(baseline, "baseline", true)
#endif

namespace kcd::cpu {
#define X(set, name, supported)                                                                                            \
  namespace set {                                                                                                          \
  void row_stats(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end); \
  void condensed_kd_backward(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end);                \
  extern const SplitRowKernels split_row;                                                                                  \
  void write_gradient_pieces(const Problem& problem, const Gradient& gradient, int64_t i, int64_t begin, int64_t end);     \
  }
KCD_INSTRUCTION_SETS(X)
#undef X
}   // namespace kcd::cpu
