// Converts pieces of a row to and from the accumulator's type.  The compiler vectorises the scalar loops.
#pragma once
#include <type_traits>

#include "cpu/vector.h"
#include "kernels.h"
#include "math/half.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace kcd {

namespace {   // as in vector.h

// ---- a vector of 16-bit numbers, to and from float32

// (Intrinsics, because gcc 12 splits the generic conversion into two halves.)
#if defined(__AVX512F__)
KCD_INLINE Vector<float> widen(const bfloat16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
#elif defined(__AVX2__)
KCD_INLINE Vector<float> widen(const bfloat16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
#else
KCD_INLINE Vector<float> widen(const bfloat16* p) {
  typedef uint16_t Halves __attribute__((vector_size(KCD_VECTOR_BYTES / 2)));
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return (Vector<float>)(__builtin_convertvector(halves, Bits<float>) << 16);
}
#endif
// to_bfloat16 for each lane: rounds to nearest, ties to even; NaN stays NaN.
#if defined(__AVX512BW__)
// NaN is truncated, not rounded.  Arithmetic yields quiet NaNs, whose upper 16 bits are a NaN too.
KCD_INLINE __m256i narrow(Vector<float> x, bfloat16) {
  const __m512i bits = (__m512i)x;
  const __mmask16 not_nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(not_nan, bits, _mm512_set1_epi32(0x10000));
  const __m512i half_up = _mm512_mask_add_epi32(bits, not_nan, bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_sub_epi32(half_up, odd, half_up, _mm512_set1_epi32(-1));
  alignas(64) static constexpr uint16_t upper_halves[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(upper_halves), rounded));
}
#else
KCD_INLINE auto narrow(Vector<float> x, bfloat16) {
  typedef uint32_t Words __attribute__((vector_size(KCD_VECTOR_BYTES)));
  typedef uint16_t Halves __attribute__((vector_size(KCD_VECTOR_BYTES / 2)));
  const Words bits = (Words)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = Words{} + 0x7fc0u;
  return __builtin_convertvector(x != x ? nan : rounded, Halves);
}
#endif
#if defined(__AVX512F__)
KCD_INLINE Vector<float> widen(const float16* p) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KCD_INLINE __m256i narrow(Vector<float> x, float16) { return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
KCD_INLINE Vector<float> widen(const float16* p) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KCD_INLINE __m128i narrow(Vector<float> x, float16) { return _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
KCD_INLINE Vector<float> widen(const float16* p) {
  Vector<float> x;
  for (int64_t j = 0; j < kLanes<float>; ++j) x[j] = to_float(p[j]);
  return x;
}
KCD_INLINE auto narrow(Vector<float> x, float16) {
  typedef uint16_t Halves __attribute__((vector_size(KCD_VECTOR_BYTES / 2)));
  Halves halves;
  for (int64_t j = 0; j < kLanes<float>; ++j) halves[j] = to_float16(x[j]).bits;
  return halves;
}
#endif

template <class Half, class = std::enable_if_t<sizeof(Half) == 2>>
KCD_INLINE void store(Half* p, Vector<float> x) {
  const auto halves = narrow(x, Half{});
  __builtin_memcpy(p, &halves, sizeof halves);
}
template <class Half, class = std::enable_if_t<sizeof(Half) == 2>>
KCD_INLINE void store(Half* p, int64_t n, Vector<float> x) {
  const auto halves = narrow(x, Half{});
  __builtin_memcpy(p, &halves, static_cast<size_t>(n) * sizeof(Half));
}
// Streams half a vector to an address that is a multiple of its size.
template <class Half, class = std::enable_if_t<sizeof(Half) == 2>>
KCD_INLINE void stream(Half* p, Vector<float> x) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(x, Half{}));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(x, Half{}));
#else
  store(p, x);
#endif
}

// ---- a piece of a row

template <class Half>
KCD_INLINE void widen(const Half* in, int64_t n, float* out) {
  int64_t j = 0;
  for (; j + kLanes<float> <= n; j += kLanes<float>) store(out + j, widen(in + j));
  for (; j < n; ++j) out[j] = to_float(in[j]);
}

// Whether this is the accumulator's type; kernels read such logits in place.
template <class Real>
KCD_INLINE bool is_accumulator_type(Type type) {
  return type == (sizeof(Real) == sizeof(double) ? Type::float64 : Type::float32);
}

// The address of a logit of the accumulator's type; null without a row.
template <class Real>
KCD_INLINE const Real* logits_at(const char* row, int64_t first) {
  return row ? reinterpret_cast<const Real*>(row) + first : nullptr;
}

// Returns logits [first, first + n) of a row in the accumulator's type: in place if they have that type, else converted into
// `scratch`.
KCD_INLINE const float* load_piece(Type type, const char* row, int64_t first, int64_t n, float* scratch) {
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
KCD_INLINE const double* load_piece(Type type, const char* row, int64_t first, int64_t n, double* scratch) {
  if (type == Type::float64) return reinterpret_cast<const double*>(row) + first;
  float float_scratch[kPiece];
  const float* x = load_piece(type, row, first, n, float_scratch);
  for (int64_t j = 0; j < n; ++j) scratch[j] = static_cast<double>(x[j]);
  return scratch;
}

template <class Half>
KCD_INLINE const float* widen_and_maximum(const char* row, int64_t first, int64_t n, float* scratch, float& max) {
  const Half* in = reinterpret_cast<const Half*>(row) + first;
  const int64_t full = n / kLanes<float> * kLanes<float>;
  widen(in + full, n - full, scratch + full);
  const Vector<float> rest = load(scratch + full, n - full, -Limits<float>::infinity());
  Vector<float> greatest = greater_of(rest, broadcast(-Limits<float>::infinity()));
  for (int64_t j = 0; j < full; j += kLanes<float>) {
    const Vector<float> x = widen(in + j);
    store(scratch + j, x);
    greatest = greater_of(x, greatest);
  }
  max = maximum(greatest);
  return scratch;
}
// As load_piece(), but also sets `max` to the greatest of the logits.
template <class Real>
KCD_INLINE const Real* load_piece_and_maximum(Type type, const char* row, int64_t first, int64_t n, Real* scratch, Real& max) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (type == Type::bfloat16) return widen_and_maximum<bfloat16>(row, first, n, scratch, max);
    if (type == Type::float16) return widen_and_maximum<float16>(row, first, n, scratch, max);
  }
  const Real* x = load_piece(type, row, first, n, scratch);
  max = maximum(x, n);
  return x;
}

// Prefetches the logits of the next piece or row while this one is summed, which hides most of the memory latency.  The hardware
// prefetcher stops at every page.
class Prefetcher {
 public:
  KCD_MEMBER Prefetcher(const Logits& logits, const char* row, int64_t first)
      : address_(row + first * size_of(logits.type) + kDistance), logit_bytes_(size_of(logits.type)) {}
  KCD_MEMBER void fetch(int64_t j) const { __builtin_prefetch(address_ + j * logit_bytes_); }

 private:
  static constexpr int64_t kDistance = 8192;   // bytes; measured: 4096 to 8192 perform alike, less is slower
  const char* address_;
  int64_t logit_bytes_;
};

}   // namespace
}   // namespace kcd
