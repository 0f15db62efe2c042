// Logits between memory and registers, sixteen bytes at a time, whatever their dtype and wherever they lie.
#pragma once
#include "cuda/port.h"
#include "kernels.h"
#include "math/half.h"

namespace kcd::cuda {

constexpr int kWordBytes = 16;
constexpr int kQuad = 4;   // classes computed at a time: more would not fit the registers

struct Word {
  uint32_t part[4];
};

// One row of a tensor.
struct Row {
  const char* begin;
  Type type;
  int size;   // bytes of a logit

  KCD_MEMBER const char* at(int c) const { return begin + int64_t{c} * size; }
};

KCD_DEVICE Row row_of(const Logits& logits, int64_t i) {
  return {logits.row(i), logits.type, static_cast<int>(size_of(logits.type))};
}

// ---- words

KCD_DEVICE Word load_aligned(const char* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

// Written past what the caches keep: nothing reads a gradient before the whole of it is there.
KCD_DEVICE void store_aligned(char* p, const Word& word) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(word.part[0], word.part[1], word.part[2], word.part[3]));
}

KCD_DEVICE int offset_of(const char* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kWordBytes); }

// The word at p, an even address: where it is not aligned the two aligned words around it are read, the second of which is the next
// thread's first, which the cache has.
KCD_DEVICE Word load_word(const char* p) {
  const int offset = offset_of(p);
  if (offset == 0) return load_aligned(p);
  const Word low = load_aligned(p - offset), high = load_aligned(p - offset + kWordBytes);
  uint32_t part[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i] = low.part[i], part[i + 4] = high.part[i];
#pragma unroll
  for (int i = 0; i < 6; ++i) part[i] = offset & 8 ? part[i + 2] : part[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) part[i] = offset & 4 ? part[i + 1] : part[i];
  Word word;
#pragma unroll
  for (int i = 0; i < 4; ++i) word.part[i] = offset & 2 ? part[i] >> 16 | part[i + 1] << 16 : part[i];
  return word;
}

// ---- 16-bit types, two in a part

struct Two {
  float low, high;
};

KCD_DEVICE Two two_of(uint32_t bits, Type type) {
  if (type == Type::bfloat16) return {bit_cast<float>(bits << 16), bit_cast<float>(bits & 0xffff0000u)};
#ifdef __CUDA_ARCH__
  Two two;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(two.low), "=f"(two.high)
      : "r"(bits));
  return two;
#else
  return {to_float(float16{static_cast<uint16_t>(bits)}), to_float(float16{static_cast<uint16_t>(bits >> 16)})};
#endif
}

// Rounded to nearest, ties to even.
KCD_DEVICE uint32_t bits_of(float low, float high, Type type) {
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

// The greater of two numbers each, as greater_of.
KCD_DEVICE uint32_t greater_two(uint32_t a, uint32_t b, Type type) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t greater;
  if (type == Type::bfloat16)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(greater) : "r"(a), "r"(b));
  return greater;
#else
  const Two x = two_of(a, type), y = two_of(b, type);
  return bits_of(greater_of(x.low, y.low), greater_of(x.high, y.high), type);
#endif
}

// ---- octets: eight classes of float32 in two words; of a 16-bit type sixteen, eight in each

struct Octet {
  Word word[2];
};

// -inf in every place.
template <Type kType>
KCD_DEVICE Word no_word() {
  constexpr uint32_t part = kType == Type::float32 ? 0xff800000u : kType == Type::float16 ? 0xfc00fc00u : 0xff80ff80u;
  return {{part, part, part, part}};
}

// The words from classes `one` and `other` on, which are aligned.
KCD_DEVICE Octet load_aligned_octet(const Row& row, int one, int other) {
  return {{load_aligned(row.at(one)), load_aligned(row.at(other))}};
}

// The same wherever they lie; -inf where they begin at `end` or after it.
template <Type kType>
KCD_DEVICE Octet load_octet(const Row& row, int one, int other, int end) {
  return {{one < end ? load_word(row.at(one)) : no_word<kType>(), other < end ? load_word(row.at(other)) : no_word<kType>()}};
}

// Eight neighbouring classes from class `one` on, of any type but float64, as float32.
KCD_DEVICE Octet load_octet_as_float32(const Row& row, int one, int end) {
  if (row.size == 4) return load_octet<Type::float32>(row, one, one + kQuad, end);
  Octet octet{{no_word<Type::float32>(), no_word<Type::float32>()}};
  if (one >= end) return octet;
  const Word word = load_word(row.at(one));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Two two = two_of(word.part[i], row.type);
    octet.word[i / 2].part[i % 2 * 2] = bit_cast<uint32_t>(two.low);
    octet.word[i / 2].part[i % 2 * 2 + 1] = bit_cast<uint32_t>(two.high);
  }
  return octet;
}

template <Type kType>
KCD_DEVICE void unpack(const Octet& octet, int quad, float (&x)[kQuad]) {
  if constexpr (kType == Type::float32) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) x[j] = bit_cast<float>(octet.word[quad].part[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; j += 2) {
      const Two two = two_of(octet.word[quad / 2].part[quad % 2 * 2 + j / 2], kType);
      x[j] = two.low;
      x[j + 1] = two.high;
    }
  }
}

// Puts four numbers where unpack finds them.
template <Type kType>
KCD_DEVICE void pack(const float (&x)[kQuad], int quad, Octet& octet) {
  if constexpr (kType == Type::float32) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) octet.word[quad].part[j] = bit_cast<uint32_t>(x[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; j += 2) octet.word[quad / 2].part[quad % 2 * 2 + j / 2] = bits_of(x[j], x[j + 1], kType);
  }
}

template <class Real>
KCD_DEVICE Real greatest(const Real (&x)[kQuad]) {
  return greater_of(greater_of(x[0], x[1]), greater_of(x[2], x[3]));
}

template <Type kType>
KCD_DEVICE float greatest(const Octet& octet) {
  if constexpr (kType == Type::float32) {
    float x[kQuad], y[kQuad];
    unpack<kType>(octet, 0, x);
    unpack<kType>(octet, 1, y);
    return greater_of(greatest(x), greatest(y));
  } else {
    uint32_t greater = octet.word[0].part[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) greater = greater_two(greater, octet.word[i / 4].part[i % 4], kType);
    const Two two = two_of(greater, kType);
    return greater_of(two.low, two.high);
  }
}

// Eight numbers of float32, stored as a 16-bit type.
KCD_DEVICE void store_narrow(const Octet& octet, Type type, char* p) {
  Word word;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t (&part)[4] = octet.word[i / 2].part;
    word.part[i] = bits_of(bit_cast<float>(part[i % 2 * 2]), bit_cast<float>(part[i % 2 * 2 + 1]), type);
  }
  store_aligned(p, word);
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
      return static_cast<Real>(two_of(*reinterpret_cast<const uint16_t*>(p), type).low);
  }
}

// -inf where there is no logit.
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
      reinterpret_cast<uint16_t*>(p)[j] = static_cast<uint16_t>(bits_of(static_cast<float>(x[j]), 0.0f, row.type));
  }
}

}   // namespace kcd::cuda
