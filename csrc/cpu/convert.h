// Pieces of a row to and from the accumulator's type.  The loops vectorise by themselves.
#pragma once
#include "cpu/vector.h"
#include "kernels.h"
#include "math/half.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace kcd {

KCD_INLINE void widen(const bfloat16* in, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]);
}
KCD_INLINE void widen(const float16* in, int64_t n, float* out) {
  int64_t j = 0;
#if defined(__F16C__)
  for (; j + 8 <= n; j += 8) _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j))));
#endif
  for (; j < n; ++j) out[j] = to_float(in[j]);
}
KCD_INLINE void narrow(const float* in, int64_t n, bfloat16* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = to_bfloat16(in[j]);
}
KCD_INLINE void narrow(const float* in, int64_t n, float16* out) {
  int64_t j = 0;
#if defined(__F16C__)
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), _mm256_cvtps_ph(_mm256_loadu_ps(in + j), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; j < n; ++j) out[j] = to_float16(in[j]);
}

// Logits [first, first + n) of a row as the accumulator's type: where they lie if they are of that type, else in `scratch`.
KCD_INLINE const float* piece(Type type, const char* row, int64_t first, int64_t n, float* scratch) {
  switch (type) {
    case Type::float32:
      return reinterpret_cast<const float*>(row) + first;
    case Type::float64: {
      const double* x = reinterpret_cast<const double*>(row) + first;
      for (int64_t j = 0; j < n; ++j) scratch[j] = static_cast<float>(x[j]);
      break;
    }
    case Type::float16:
      widen(reinterpret_cast<const float16*>(row) + first, n, scratch);
      break;
    case Type::bfloat16:
      widen(reinterpret_cast<const bfloat16*>(row) + first, n, scratch);
      break;
  }
  return scratch;
}
KCD_INLINE const double* piece(Type type, const char* row, int64_t first, int64_t n, double* scratch) {
  if (type == Type::float64) return reinterpret_cast<const double*>(row) + first;
  float single[kPiece];
  const float* x = piece(type, row, first, n, single);
  for (int64_t j = 0; j < n; ++j) scratch[j] = static_cast<double>(x[j]);
  return scratch;
}

// Where the logits lie that are wanted next.  The hardware's own prefetcher stops at every page; asking for the row after this one
// (or the piece) while this one is summed hides most of the way to memory.
struct Ahead {
  const char* address;
  int64_t bytes_a_lane;
  KCD_MEMBER void fetch(int64_t j) const { __builtin_prefetch(address + j * bytes_a_lane); }
};

KCD_INLINE Ahead ahead(const Logits& logits, const char* row, int64_t first) {
  constexpr int64_t kDistance = 4096;   // bytes; measured: 2048 to 8192 are alike
  return {row + first * size_of(logits.type) + kDistance, size_of(logits.type)};
}

// Where [first, first + n) of the gradient is computed, and how it reaches its row from there.
KCD_INLINE float* gradient_piece(Type type, char* row, int64_t first, float* scratch) {
  return type == Type::float32 ? reinterpret_cast<float*>(row) + first : scratch;
}
KCD_INLINE double* gradient_piece(Type, char* row, int64_t first, double*) { return reinterpret_cast<double*>(row) + first; }
KCD_INLINE void finish_gradient_piece(Type type, char* row, int64_t first, int64_t n, const float* scratch) {
  if (type == Type::float16) narrow(scratch, n, reinterpret_cast<float16*>(row) + first);
  if (type == Type::bfloat16) narrow(scratch, n, reinterpret_cast<bfloat16*>(row) + first);
}
KCD_INLINE void finish_gradient_piece(Type, char*, int64_t, int64_t, const double*) {}

}   // namespace kcd
