// Pieces of a row to and from the accumulator's type.  The loops vectorise by themselves.
#pragma once
#include <type_traits>

#include "cpu/vector.h"
#include "kernels.h"
#include "math/half.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace kcd {

namespace {   // like the vectors' types

// ---- a vector of 16-bit numbers, to and from float32

// (gcc 12 would make one conversion of two halves.)
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
// Round to nearest, ties to even; NaN stays NaN: to_bfloat16, lane by lane.
#if defined(__AVX512BW__)
// NaN is cut off unrounded: what arithmetic gives is quiet, so that the upper half of its bits is a NaN by itself.
KCD_INLINE __m256i narrow(Vector<float> x, bfloat16) {
  const __m512i bits = (__m512i)x;
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  const __m512i half_up = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
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
// Half a vector, to an address that is a multiple of its size.
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

// Whether logits of that type are read where they lie.
template <class Real>
KCD_INLINE bool is_type(Type type) {
  return type == (sizeof(Real) == sizeof(double) ? Type::float64 : Type::float32);
}

// Logits of the accumulator's type where they lie; null: no row.
template <class Real>
KCD_INLINE const Real* in_memory(const char* row, int64_t first) {
  return row ? reinterpret_cast<const Real*>(row) + first : nullptr;
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

// piece(), and the greatest of the logits.
template <class Half>
KCD_INLINE const float* widen_and_maximum(const char* row, int64_t first, int64_t n, float* scratch, float& max) {
  const Half* in = reinterpret_cast<const Half*>(row) + first;
  const int64_t whole = n / kLanes<float> * kLanes<float>;
  widen(in + whole, n - whole, scratch + whole);
  const Vector<float> rest = load(scratch + whole, n - whole, -Limits<float>::infinity());
  Vector<float> greatest = greater_of(rest, broadcast(-Limits<float>::infinity()));
  for (int64_t j = 0; j < whole; j += kLanes<float>) {
    const Vector<float> x = widen(in + j);
    store(scratch + j, x);
    greatest = greater_of(x, greatest);
  }
  max = maximum(greatest);
  return scratch;
}
template <class Real>
KCD_INLINE const Real* piece_and_maximum(Type type, const char* row, int64_t first, int64_t n, Real* scratch, Real& max) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (type == Type::bfloat16) return widen_and_maximum<bfloat16>(row, first, n, scratch, max);
    if (type == Type::float16) return widen_and_maximum<float16>(row, first, n, scratch, max);
  }
  const Real* x = piece(type, row, first, n, scratch);
  max = maximum(x, n);
  return x;
}

// Where the logits lie that are wanted later.  The hardware's own prefetcher stops at every page; asking for what comes after this
// piece, or row, while this one is summed hides most of the way to memory.
struct Ahead {
  const char* address;
  int64_t bytes_a_lane;
  KCD_MEMBER void fetch(int64_t j) const { __builtin_prefetch(address + j * bytes_a_lane); }
};

KCD_INLINE Ahead ahead(const Logits& logits, const char* row, int64_t first) {
  constexpr int64_t kDistance = 8192;   // bytes; measured: 4096 to 8192 are alike, less is slower
  return {row + first * size_of(logits.type) + kDistance, size_of(logits.type)};
}

}   // namespace
}   // namespace kcd
