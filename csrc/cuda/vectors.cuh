// Logits between memory and registers, in vectors of 16 bytes, for every dtype and alignment.
#pragma once
#include "cuda/port.h"
#include "kernels.h"
#include "math/half.h"

namespace kcd::cuda {

constexpr int kVectorBytes = 16;
constexpr int kQuad = 4;   // classes computed at a time; more would not fit in registers

struct Vector {
  uint32_t bits[4];
};

// One row of a tensor.
struct Row {
  const char* begin;
  Type type;
  int size;   // bytes per logit

  KCD_MEMBER const char* at(int c) const { return begin + int64_t{c} * size; }
};

KCD_DEVICE Row row_of(const Logits& logits, int64_t i) {
  return {logits.row(i), logits.type, static_cast<int>(size_of(logits.type))};
}

// ---- vectors

KCD_DEVICE Vector load_aligned(const char* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

// A streaming store: the gradient is not read until all of it has been written.
KCD_DEVICE void store_aligned(char* p, const Vector& vector) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(vector.bits[0], vector.bits[1], vector.bits[2], vector.bits[3]));
}

KCD_DEVICE int offset_of(const char* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kVectorBytes); }

// Loads 16 bytes from an even address.  If it is unaligned, loads the two aligned vectors around it; the second is cached,
// because it is the next thread's first.
KCD_DEVICE Vector load_vector(const char* p) {
  const int offset = offset_of(p);
  if (offset == 0) return load_aligned(p);
  const Vector low = load_aligned(p - offset), high = load_aligned(p - offset + kVectorBytes);
  uint32_t part[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i] = low.bits[i], part[i + 4] = high.bits[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) part[i] = offset & 8 ? part[i + 2] : part[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) part[i] = offset & 4 ? part[i + 1] : part[i];
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) vector.bits[i] = offset & 2 ? part[i] >> 16 | part[i + 1] << 16 : part[i];
  return vector;
}

// ---- 16-bit types, two in 32 bits

struct FloatPair {
  float low, high;
};

KCD_DEVICE FloatPair unpack_pair(uint32_t bits, Type type) {
  if (type == Type::bfloat16) return {bit_cast<float>(bits << 16), bit_cast<float>(bits & 0xffff0000u)};
#ifdef __CUDA_ARCH__
  FloatPair floats;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(floats.low), "=f"(floats.high)
      : "r"(bits));
  return floats;
#else
  return {to_float(float16{static_cast<uint16_t>(bits)}), to_float(float16{static_cast<uint16_t>(bits >> 16)})};
#endif
}

// Round to nearest, ties to even.
KCD_DEVICE uint32_t pack_pair(float low, float high, Type type) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  if (type == Type::bfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  if (type == Type::bfloat16) return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
  return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
#endif
}

// max_number, element by element.
KCD_DEVICE uint32_t max_pair(uint32_t a, uint32_t b, Type type) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t greater;
  if (type == Type::bfloat16)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  return greater;
#else
  const FloatPair x = unpack_pair(a, type), y = unpack_pair(b, type);
  return pack_pair(max_number(x.low, y.low), max_number(x.high, y.high), type);
#endif
}

// ---- pairs of vectors: 8 classes of float32, or 16 of a 16-bit type

struct VectorPair {
  Vector vector[2];
};

// -inf in every element.
template <Type kType>
KCD_DEVICE Vector empty_vector() {
  constexpr uint32_t part = kType == Type::float32 ? 0xff800000u : kType == Type::float16 ? 0xfc00fc00u : 0xff80ff80u;
  return {{part, part, part, part}};
}

// Loads the aligned vectors at classes `first_class` and `second_class`.
KCD_DEVICE VectorPair load_aligned_vectors(const Row& row, int first_class, int second_class) {
  return {{load_aligned(row.at(first_class)), load_aligned(row.at(second_class))}};
}

// The same at any alignment; -inf if a vector starts at `end` or after it.
template <Type kType>
KCD_DEVICE VectorPair load_vectors(const Row& row, int first_class, int second_class, int end) {
  return {{first_class < end ? load_vector(row.at(first_class)) : empty_vector<kType>(),
           second_class < end ? load_vector(row.at(second_class)) : empty_vector<kType>()}};
}

// Loads eight adjacent classes, starting at `first_class`, of any type except float64, as float32.
KCD_DEVICE VectorPair load_vectors_as_float32(const Row& row, int first_class, int end) {
  if (row.size == 4) return load_vectors<Type::float32>(row, first_class, first_class + kQuad, end);
  VectorPair pair{{empty_vector<Type::float32>(), empty_vector<Type::float32>()}};
  if (first_class >= end) return pair;
  const Vector vector = load_vector(row.at(first_class));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const FloatPair floats = unpack_pair(vector.bits[i], row.type);
    pair.vector[i / 2].bits[i % 2 * 2] = bit_cast<uint32_t>(floats.low);
    pair.vector[i / 2].bits[i % 2 * 2 + 1] = bit_cast<uint32_t>(floats.high);
  }
  return pair;
}

template <Type kType>
KCD_DEVICE void unpack(const VectorPair& pair, int quad, float (&x)[kQuad]) {
  if constexpr (kType == Type::float32) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) x[j] = bit_cast<float>(pair.vector[quad].bits[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; j += 2) {
      const FloatPair floats = unpack_pair(pair.vector[quad / 2].bits[quad % 2 * 2 + j / 2], kType);
      x[j] = floats.low;
      x[j + 1] = floats.high;
    }
  }
}

// The inverse of unpack.
template <Type kType>
KCD_DEVICE void pack(const float (&x)[kQuad], int quad, VectorPair& pair) {
  if constexpr (kType == Type::float32) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) pair.vector[quad].bits[j] = bit_cast<uint32_t>(x[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; j += 2) pair.vector[quad / 2].bits[quad % 2 * 2 + j / 2] = pack_pair(x[j], x[j + 1], kType);
  }
}

template <class Real>
KCD_DEVICE Real max_of(const Real (&x)[kQuad]) {
  return max_number(max_number(x[0], x[1]), max_number(x[2], x[3]));
}

template <Type kType>
KCD_DEVICE float max_of(const VectorPair& pair) {
  if constexpr (kType == Type::float32) {
    float x[kQuad], y[kQuad];
    unpack<kType>(pair, 0, x);
    unpack<kType>(pair, 1, y);
    return max_number(max_of(x), max_of(y));
  } else {
    uint32_t greater = pair.vector[0].bits[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) greater = max_pair(greater, pair.vector[i / 4].bits[i % 4], kType);
    const FloatPair floats = unpack_pair(greater, kType);
    return max_number(floats.low, floats.high);
  }
}

// Stores eight float32 numbers as a 16-bit type.
KCD_DEVICE void store_as_16_bit(const VectorPair& pair, Type type, char* p) {
  Vector vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t (&part)[4] = pair.vector[i / 2].bits;
    vector.bits[i] = pack_pair(bit_cast<float>(part[i % 2 * 2]), bit_cast<float>(part[i % 2 * 2 + 1]), type);
  }
  store_aligned(p, vector);
}

// ---- quads: four classes of any type, of which the first n exist

template <class Real>
KCD_DEVICE Real load_logit(const char* p, Type type) {
  switch (type) {
    case Type::float64:
      return static_cast<Real>(*reinterpret_cast<const double*>(p));
    case Type::float32:
      return static_cast<Real>(*reinterpret_cast<const float*>(p));
    default:
      return static_cast<Real>(unpack_pair(*reinterpret_cast<const uint16_t*>(p), type).low);
  }
}

// Logits that do not exist are -inf.
template <class Real>
KCD_DEVICE void load_quad(const Row& row, int c, int n, Real (&x)[kQuad]) {
  const char* p = row.at(c);
#pragma unroll
  for (int j = 0; j < kQuad; ++j) x[j] = j < n ? load_logit<Real>(p + j * row.size, row.type) : -Limits<Real>::infinity();
}

template <class Real>
KCD_DEVICE void store_quad(const Real (&x)[kQuad], const Row& row, int c, int n) {
  char* p = const_cast<char*>(row.at(c));
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    if (j >= n) continue;
    if (row.type == Type::float64)
      reinterpret_cast<double*>(p)[j] = static_cast<double>(x[j]);
    else if (row.type == Type::float32)
      reinterpret_cast<float*>(p)[j] = static_cast<float>(x[j]);
    else
      reinterpret_cast<uint16_t*>(p)[j] = static_cast<uint16_t>(pack_pair(static_cast<float>(x[j]), 0.0f, row.type));
  }
}

}   // namespace kcd::cuda
