// The instruction sets that forward.cpp and backward.cpp are compiled for, one namespace each.
#pragma once
#include "kernels.h"

// KCD_SETS(X): X(namespace, name for KCD_ISA, what must hold on this processor), best first.
#if defined(__x86_64__)
#define KCD_SETS(X)                                                                                                  \
  X(avx512, "avx512",                                                                                                \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && \
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))       \
  X(avx2, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) \
  X(baseline, "baseline", true)
#else
#define KCD_SETS(X) X(baseline, "baseline", true)
#endif

namespace kcd::cpu {
#define X(set, name, supported)                                                                                          \
  namespace set {                                                                                                        \
  void forward(const Problem& problem, const RowOutputs& outputs, const Gradient* gradient, int64_t begin, int64_t end); \
  void backward(const Problem& problem, const Gradient& gradient, int64_t begin, int64_t end);                           \
  extern const SplitRow split_row;                                                                                       \
  void write_pieces(const Problem& problem, const Gradient& gradient, int64_t i, int64_t begin, int64_t end);            \
  }
KCD_SETS(X)
#undef X
}   // namespace kcd::cpu
