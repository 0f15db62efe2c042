// Language and library features that the formulas need, on host and device.
//
// Everything in this folder is `static inline`, because it is compiled once for each instruction set.  With shared out-of-line
// copies the linker could pick AVX-512 code for a machine without AVX-512.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define KCD_INLINE static KCD_MEMBER
#define KCD_MEMBER __host__ __device__ __forceinline__
#else
#define KCD_INLINE static KCD_MEMBER
#define KCD_MEMBER inline KCD_LAMBDA
#define KCD_LAMBDA __attribute__((always_inline))   // goes after a lambda's parameters
#endif

namespace kcd {

template <class To, class From>
KCD_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of equal size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct Limits;
template <>
struct Limits<float> {
  KCD_INLINE float infinity() { return __builtin_huge_valf(); }
  KCD_INLINE float nan() { return __builtin_nanf(""); }
  KCD_INLINE float smallest() { return 1.17549435e-38f; }   // normal
  KCD_INLINE float root_of_smallest() { return 0x1p-63f; }
  KCD_INLINE float fourth_root_of_smallest() { return 0x1.6a09e8p-32f; }
  KCD_INLINE float largest() { return 3.40282347e+38f; }
};
template <>
struct Limits<double> {
  KCD_INLINE double infinity() { return __builtin_huge_val(); }
  KCD_INLINE double nan() { return __builtin_nan(""); }
  KCD_INLINE double smallest() { return 2.2250738585072014e-308; }
  KCD_INLINE double root_of_smallest() { return 0x1p-511; }
  KCD_INLINE double fourth_root_of_smallest() { return 0x1.6a09e667f3bcdp-256; }
  KCD_INLINE double largest() { return 1.7976931348623157e+308; }
};

#ifdef __CUDACC__
#define KCD_MATH(name) ::name
#else
#define KCD_MATH(name) __builtin_##name
#endif
KCD_INLINE float exponential(float x) { return KCD_MATH(expf)(x); }
KCD_INLINE double exponential(double x) { return KCD_MATH(exp)(x); }
KCD_INLINE float logarithm(float x) { return KCD_MATH(logf)(x); }
KCD_INLINE double logarithm(double x) { return KCD_MATH(log)(x); }
KCD_INLINE float log_of_1_plus(float x) { return KCD_MATH(log1pf)(x); }
KCD_INLINE double log_of_1_plus(double x) { return KCD_MATH(log1p)(x); }
#undef KCD_MATH

constexpr double kLn2 = 0.69314718055994530942, kLog2E = 1.44269504088896340736;

}   // namespace kcd
