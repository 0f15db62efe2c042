// Vectors as wide as the instruction set that this file is compiled for, and their exponential.
//
// The vector extension of GCC and Clang covers arithmetic on x86 and ARM.  Only what it cannot express is written for each
// instruction set.
#pragma once
#include "math/portable.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KCD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KCD_VECTOR_BYTES 32
#else
#define KCD_VECTOR_BYTES 16
#endif

namespace kcd {
namespace {   // these types differ between instruction sets, so none may be visible outside its object file

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Vector __attribute__((vector_size(KCD_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(KCD_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double Vector __attribute__((vector_size(KCD_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(KCD_VECTOR_BYTES)));
};
template <class Real>
using Vector = typename VectorOf<Real>::Vector;
template <class Real>
using Bits = typename VectorOf<Real>::Bits;
template <class Real>
constexpr int64_t kLanes = KCD_VECTOR_BYTES / static_cast<int64_t>(sizeof(Real));

// Classes summed at a time: few enough additions per lane to keep rounding errors small, enough to make merging cheap.  Two float64
// pieces fit into a 32 KiB first-level cache.
constexpr int64_t kPiece = 128 * kLanes<float>;

template <class Real>
KCD_INLINE Vector<Real> broadcast(Real x) {
  return x - Vector<Real>{};   // the compiler drops this 0, but would keep x + 0, since -0 + 0 is 0
}
template <class Real>
KCD_INLINE Vector<Real> load(const Real* p) {
  Vector<Real> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// Loads the first n < kLanes elements and fills the other lanes with `fill`.  Reads nothing past the n elements.
#if defined(__AVX512F__)
KCD_INLINE Vector<float> load(const float* p, int64_t n, float fill) {
  return (Vector<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
}
KCD_INLINE Vector<double> load(const double* p, int64_t n, double fill) {
  return (Vector<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p);
}
#else
template <class Real>
KCD_INLINE Vector<Real> load(const Real* p, int64_t n, Real fill) {
  Vector<Real> lanes = broadcast(fill);
  __builtin_memcpy(&lanes, p, static_cast<size_t>(n) * sizeof(Real));
  return lanes;
}
#endif
template <class Real>
KCD_INLINE void store(Real* p, Vector<Real> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
#if defined(__AVX512F__)
KCD_INLINE void store(float* p, int64_t n, Vector<float> v) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
KCD_INLINE void store(double* p, int64_t n, Vector<double> v) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}
#else
template <class Real>
KCD_INLINE void store(Real* p, int64_t n, Vector<Real> v) {
  __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(Real));
}
#endif

// A store that bypasses the caches, for data that is not read soon.  The address must be a multiple of the vector's size.
// stream_fence() orders such stores before the thread's later ones.
#if defined(__AVX512F__)
KCD_INLINE void stream(float* p, Vector<float> v) { _mm512_stream_ps(p, (__m512)v); }
KCD_INLINE void stream(double* p, Vector<double> v) { _mm512_stream_pd(p, (__m512d)v); }
#elif defined(__AVX2__)
KCD_INLINE void stream(float* p, Vector<float> v) { _mm256_stream_ps(p, (__m256)v); }
KCD_INLINE void stream(double* p, Vector<double> v) { _mm256_stream_pd(p, (__m256d)v); }
#elif defined(__SSE2__)
KCD_INLINE void stream(float* p, Vector<float> v) { _mm_stream_ps(p, (__m128)v); }
KCD_INLINE void stream(double* p, Vector<double> v) { _mm_stream_pd(p, (__m128d)v); }
#else
template <class Real>
KCD_INLINE void stream(Real* p, Vector<Real> v) {
  store(p, v);
}
#endif
KCD_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Rounds a product before it is used in a sum.  In a b - c d the compiler may fuse either product, and could choose differently in
// two loops.  This makes all loops give the same numbers.
template <class V>
KCD_INLINE V round_product(V product) {
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// The number of elements before the next address that is a multiple of `bytes`.
template <class Element>
KCD_INLINE int64_t elements_to_alignment(const Element* p, uint64_t bytes) {
  const uint64_t past = reinterpret_cast<uint64_t>(p) % bytes;
  return past ? static_cast<int64_t>((bytes - past) / sizeof(Element)) : 0;
}

// A mask of lanes.
#if defined(__AVX512F__)
template <class Real>
struct MaskOf;
template <>
struct MaskOf<float> {
  using Mask = __mmask16;
};
template <>
struct MaskOf<double> {
  using Mask = __mmask8;
};
template <class Real>
using Mask = typename MaskOf<Real>::Mask;

// NaN is unequal to everything and less than nothing.
KCD_INLINE Mask<float> not_equal(Vector<float> a, Vector<float> b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ); }
KCD_INLINE Mask<double> not_equal(Vector<double> a, Vector<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NEQ_UQ);
}
KCD_INLINE Mask<float> not_less(Vector<float> a, Vector<float> b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ); }
KCD_INLINE Mask<double> not_less(Vector<double> a, Vector<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLT_UQ);
}
// x in the lanes of the mask, 0 in the others
KCD_INLINE Vector<float> where(Mask<float> mask, Vector<float> x) { return (Vector<float>)_mm512_maskz_mov_ps(mask, (__m512)x); }
KCD_INLINE Vector<double> where(Mask<double> mask, Vector<double> x) {
  return (Vector<double>)_mm512_maskz_mov_pd(mask, (__m512d)x);
}
// sum + x or sum + a b in the lanes of the mask, sum in the others: one instruction
KCD_INLINE Vector<float> add_where(Mask<float> mask, Vector<float> sum, Vector<float> x) {
  return (Vector<float>)_mm512_mask_add_ps((__m512)sum, mask, (__m512)sum, (__m512)x);
}
KCD_INLINE Vector<double> add_where(Mask<double> mask, Vector<double> sum, Vector<double> x) {
  return (Vector<double>)_mm512_mask_add_pd((__m512d)sum, mask, (__m512d)sum, (__m512d)x);
}
KCD_INLINE Vector<float> add_product_where(Mask<float> mask, Vector<float> sum, Vector<float> a, Vector<float> b) {
  return (Vector<float>)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)sum, mask);
}
KCD_INLINE Vector<double> add_product_where(Mask<double> mask, Vector<double> sum, Vector<double> a, Vector<double> b) {
  return (Vector<double>)_mm512_mask3_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum, mask);
}
#else
template <class Real>
using Mask = Bits<Real>;
KCD_INLINE Mask<float> not_equal(Vector<float> a, Vector<float> b) { return a != b; }
KCD_INLINE Mask<double> not_equal(Vector<double> a, Vector<double> b) { return a != b; }
KCD_INLINE Mask<float> not_less(Vector<float> a, Vector<float> b) { return ~(a < b); }
KCD_INLINE Mask<double> not_less(Vector<double> a, Vector<double> b) { return ~(a < b); }
KCD_INLINE Vector<float> where(Mask<float> mask, Vector<float> x) { return (Vector<float>)((Bits<float>)x & mask); }
KCD_INLINE Vector<double> where(Mask<double> mask, Vector<double> x) { return (Vector<double>)((Bits<double>)x & mask); }
template <class M, class V>
KCD_INLINE V add_where(M mask, V sum, V x) {
  return sum + where(mask, x);
}
template <class M, class V>
KCD_INLINE V add_product_where(M mask, V sum, V a, V b) {
  return sum + a * where(mask, b);
}
#endif

// a > b ? a : b in each lane; b if either is NaN.  The max instruction has a third of the latency of a comparison and a blend,
// which matters in a chain of maxima.
#if defined(__AVX512F__)
KCD_INLINE Vector<float> greater_of(Vector<float> a, Vector<float> b) { return (Vector<float>)_mm512_max_ps((__m512)a, (__m512)b); }
KCD_INLINE Vector<double> greater_of(Vector<double> a, Vector<double> b) {
  return (Vector<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
}
#elif defined(__AVX2__)
KCD_INLINE Vector<float> greater_of(Vector<float> a, Vector<float> b) { return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b); }
KCD_INLINE Vector<double> greater_of(Vector<double> a, Vector<double> b) {
  return (Vector<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
}
#elif defined(__SSE2__)
KCD_INLINE Vector<float> greater_of(Vector<float> a, Vector<float> b) { return (Vector<float>)_mm_max_ps((__m128)a, (__m128)b); }
KCD_INLINE Vector<double> greater_of(Vector<double> a, Vector<double> b) {
  return (Vector<double>)_mm_max_pd((__m128d)a, (__m128d)b);
}
#else
template <class V>
KCD_INLINE V greater_of(V a, V b) {
  return a > b ? a : b;
}
#endif

// Reductions over the lanes, in a fixed order.
#if defined(__AVX512F__)
KCD_INLINE float sum(Vector<float> v) { return _mm512_reduce_add_ps((__m512)v); }
KCD_INLINE double sum(Vector<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
KCD_INLINE float maximum(Vector<float> v) { return _mm512_reduce_max_ps((__m512)v); }
KCD_INLINE double maximum(Vector<double> v) { return _mm512_reduce_max_pd((__m512d)v); }
#else
template <class V>
KCD_INLINE auto sum(V v) {
  auto total = v[0];
  for (size_t j = 1; j < sizeof v / sizeof v[0]; ++j) total += v[j];
  return total;
}
template <class V>
KCD_INLINE auto maximum(V v) {
  auto greatest = v[0];
  for (size_t j = 1; j < sizeof v / sizeof v[0]; ++j) greatest = v[j] > greatest ? v[j] : greatest;
  return greatest;
}
#endif

// Two chains, because each step waits for the one before it.
template <class Real>
KCD_INLINE Real maximum(const Real* x, int64_t n) {
  const Real lowest = -Limits<Real>::infinity();
  Vector<Real> even = broadcast(lowest), odd = even;
  int64_t j = 0;
  for (; j + 2 * kLanes<Real> <= n; j += 2 * kLanes<Real>) {
    even = greater_of(load(x + j), even);
    odd = greater_of(load(x + j + kLanes<Real>), odd);
  }
  for (; j < n; j += kLanes<Real>) even = greater_of(j + kLanes<Real> <= n ? load(x + j) : load(x + j, n - j, lowest), even);
  return maximum(greater_of(odd, even));
}

// 2^x for x <= 0.  Exactly 1 at 0 and 0 at -inf; NaN stays NaN; results below the smallest normal number (or three quarters of it)
// are 0.
//
// x = n + r with n the nearest integer and |r| <= 1/2, exactly; 2^n goes into the exponent bits.  Adding 1.5 * 2^23 (2^52) rounds
// to an integer and leaves n in the low bits.
#if defined(__AVX512F__)
// 2^x = 2^floor(x) * 2^(i/32) * 2^r with i = floor(32 x) mod 32 and 0 <= r < 1/32.  The middle factor comes from a table in two
// registers, the last from a quadratic 1 + r (c1 + c2 r) with an error of 3e-9.  The total relative error is 1.8e-7.
alignas(64) static const float kPowersOfTwo[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9e0p+0f,
    0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f,
    0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};

KCD_INLINE Vector<float> exp2(Vector<float> x) {
  const __m512 v = (__m512)x;
  // Floats near 1.5 * 2^18 are spaced by 1/32, so the low five bits of the sum are floor(32 x) mod 32.
  const __m512 rounded = _mm512_add_round_ps(v, _mm512_set1_ps(393216.0f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_reduce_ps(v, 0x50 | _MM_FROUND_TO_NEG_INF);   // x - floor(32 x) / 32
  const __m512 power =
      _mm512_permutex2var_ps(_mm512_load_ps(kPowersOfTwo), _mm512_castps_si512(rounded), _mm512_load_ps(kPowersOfTwo + 16));
  const __m512 slope = _mm512_fmadd_ps(_mm512_set1_ps(0.2426526925f), r, _mm512_set1_ps(0.6931237316f));
  const __mmask16 normal = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vector<float>)_mm512_maskz_scalef_ps(normal, _mm512_fmadd_ps(_mm512_mul_ps(power, r), slope, power), v);
}
#else
KCD_INLINE Vector<float> exp2(Vector<float> x) {
  // At n = -127 the exponent bits are 0, and so is the power: anything lower needs no special case.
  const Vector<float> magic = broadcast(12582912.0f), bounded = greater_of(broadcast(-127.0f), x);
  const Vector<float> shifted = bounded + magic;
  const Vector<float> r = bounded - (shifted - magic);
  // Minimax on [-1/2, 1/2] with the constant term fixed at 1.  Relative error 9e-8; 1.7e-7 with rounding.
  Vector<float> p = broadcast(0x1.5bba14p-10f);
  p = p * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  const Bits<float> power = ((Bits<float>)shifted << 23) + 0x3f800000;
  return p * (Vector<float>)power;
}
#endif

KCD_INLINE Vector<double> exp2(Vector<double> x) {
  const Vector<double> magic = broadcast(6755399441055744.0), bounded = greater_of(broadcast(-1023.0), x);
  const Vector<double> shifted = bounded + magic;
  const Vector<double> t = (bounded - (shifted - magic)) * 0.693147180559945309;
  // e^t = sum t^n / n!.  |t| <= 0.347, so the terms after n = 13 add less than 5e-18.
  Vector<double> p = broadcast(1.0 / 6227020800.0);
  p = p * t + 1.0 / 479001600.0;
  p = p * t + 1.0 / 39916800.0;
  p = p * t + 1.0 / 3628800.0;
  p = p * t + 1.0 / 362880.0;
  p = p * t + 1.0 / 40320.0;
  p = p * t + 1.0 / 5040.0;
  p = p * t + 1.0 / 720.0;
  p = p * t + 1.0 / 120.0;
  p = p * t + 1.0 / 24.0;
  p = p * t + 1.0 / 6.0;
  p = p * t + 0.5;
  p = p * t + 1.0;
  p = p * t + 1.0;
  const Bits<double> power = ((Bits<double>)shifted << 52) + (int64_t{1023} << 52);
  return p * (Vector<double>)power;
}

}   // namespace
}   // namespace kcd
