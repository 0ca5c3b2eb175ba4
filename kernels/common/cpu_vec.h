// One SIMD register of float, whatever the instruction set this file is compiled for.
//
// Everything lives in the namespace of the instruction set (FASTRES_ISA is given by the build: baseline, avx2, avx512), because the
// same source is compiled once for each: a shared inline function would be merged by the linker and an old CPU could be handed the
// AVX-512 copy of it. For the same reason the kernels include no C++ standard header.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FASTRES_ISA
#error "define FASTRES_ISA (the namespace of this instruction set)"
#endif

namespace fastres::FASTRES_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t ByteBits __attribute__((vector_size(kVectorBytes / 4)));

struct bf16 {
  uint16_t bits;
};

// Lanes of a "register": the kernels are templates on V, which is Vec where neighbours in memory are neighbours in the vector, or
// float where they are not (strided windows of a plane). Both do the same arithmetic, bit for bit.
template <class V>
constexpr int kLanes = static_cast<int>(sizeof(V) / sizeof(float));
constexpr int kWidth = kLanes<Vec>;

#define FASTRES_INLINE static inline __attribute__((always_inline))

// ---- arithmetic -----------------------------------------------------------------------------------------------------------------
// a*b + c: one rounding where the instruction set has it, two otherwise, and never left to the compiler's contraction: forward and
// backward must compute the pre-activation with identical bits, or their ReLU masks disagree.
FASTRES_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

FASTRES_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// max(x, 0) that keeps NaN.
FASTRES_INLINE Vec relu(Vec x) { return (x <= 0.0f) ? Vec{} : x; }
FASTRES_INLINE float relu(float x) { return x <= 0.0f ? 0.0f : x; }

// x where condition > 0, else 0 (also where condition is NaN).
FASTRES_INLINE Vec where_positive(Vec condition, Vec x) { return (condition > 0.0f) ? x : Vec{}; }
FASTRES_INLINE float where_positive(float condition, float x) { return condition > 0.0f ? x : 0.0f; }

template <class V>
FASTRES_INLINE V splat(float x) {
  return x - V{};  // x - 0 keeps -0, which x + 0 would not
}

// ---- bfloat16 -------------------------------------------------------------------------------------------------------------------
FASTRES_INLINE float to_float(float x) { return x; }

FASTRES_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// Round to nearest, ties to even, on the integer representation; a NaN becomes a quiet NaN of the same sign (adding the rounding term
// could carry its mantissa into infinity).
FASTRES_INLINE void from_float(float x, float* out) { *out = x; }

FASTRES_INLINE void from_float(float x, bf16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t sum = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t kept = x != x ? (bits | 0x400000u) : sum;
  out->bits = static_cast<uint16_t>(kept >> 16);
}

// x as it reads back after being stored as T.
template <class T>
FASTRES_INLINE float rounded(float x) {
  T stored;
  from_float(x, &stored);
  return to_float(stored);
}

FASTRES_INLINE Bits bf16_bits(Vec x) {
  const Bits bits = (Bits)x;
  const Bits sum = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (x != x) ? (bits | 0x400000u) : sum;
}

template <class T>
FASTRES_INLINE Vec rounded(Vec x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  return (Vec)(bf16_bits(x) & 0xffff0000u);
}

// ---- memory: unaligned, whole vectors -------------------------------------------------------------------------------------------
FASTRES_INLINE void load(const float* p, Vec* out) { __builtin_memcpy(out, p, sizeof *out); }

FASTRES_INLINE void load(const bf16* p, Vec* out) {
  HalfBits half;
  __builtin_memcpy(&half, p, sizeof half);
  const Bits bits = __builtin_convertvector(half, Bits) << 16;
  *out = (Vec)bits;
}

FASTRES_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }

FASTRES_INLINE void store(bf16* p, Vec x) {
  const HalfBits half = __builtin_convertvector(bf16_bits(x) >> 16, HalfBits);
  __builtin_memcpy(p, &half, sizeof half);
}

template <class T>
FASTRES_INLINE void load(const T* p, float* out) {
  *out = to_float(*p);
}
template <class T>
FASTRES_INLINE void store(T* p, float x) {
  from_float(x, p);
}

// ---- memory: the first `lanes` elements of a vector (Partial), or all of them ------------------------------------------------------
// The other lanes read as zero and are not written.
template <class V, bool Partial, class T>
FASTRES_INLINE V load(const T* p, int64_t lanes) {
  V out;
  if constexpr (Partial) {
    float buffer[kLanes<V>] = {};
    for (int64_t i = 0; i < lanes; ++i) buffer[i] = to_float(p[i]);
    load(buffer, &out);
  } else {
    load(p, &out);
  }
  return out;
}

template <bool Partial, class T, class V>
FASTRES_INLINE void store(T* p, V x, int64_t lanes) {
  if constexpr (Partial) {
    float buffer[kLanes<V>];
    store(buffer, x);
    for (int64_t i = 0; i < lanes; ++i) from_float(buffer[i], p + i);
  } else {
    store(p, x);
  }
}

// ---- memory: K neighbouring vectors -------------------------------------------------------------------------------------------------
// "T's lane order": for bf16, whole vectors come in pairs of the even and the odd elements, which costs one shift or one mask each and no
// shuffle. Whatever meets them, coefficients and sums, is brought into that order once a block, not once a row.
template <class T, int K, bool Partial>
constexpr bool kPaired = sizeof(T) == sizeof(bf16) && !Partial && K % 2 == 0;

#if defined(__clang__)
#define FASTRES_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTRES_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Mask){__VA_ARGS__})
#endif

FASTRES_INLINE void split_even_odd(Vec* a, Vec* b) {
  const Vec x = *a, y = *b;
#if defined(__AVX512F__)
  *a = FASTRES_SHUFFLE(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *b = FASTRES_SHUFFLE(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  *a = FASTRES_SHUFFLE(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
  *b = FASTRES_SHUFFLE(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  *a = FASTRES_SHUFFLE(x, y, 0, 2, 4, 6);
  *b = FASTRES_SHUFFLE(x, y, 1, 3, 5, 7);
#endif
}

FASTRES_INLINE void join_even_odd(Vec* a, Vec* b) {
  const Vec x = *a, y = *b;
#if defined(__AVX512F__)
  *a = FASTRES_SHUFFLE(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *b = FASTRES_SHUFFLE(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  *a = FASTRES_SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
  *b = FASTRES_SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  *a = FASTRES_SHUFFLE(x, y, 0, 4, 1, 5);
  *b = FASTRES_SHUFFLE(x, y, 2, 6, 3, 7);
#endif
}

template <bool Partial, class T, int K>
FASTRES_INLINE void load_vectors(const T* p, int64_t lanes, Vec (&out)[K]) {
  for (int k = 0; k < K; ++k) {
    if constexpr (kPaired<T, K, Partial>) {
      if (k % 2) continue;
      Bits pair;
      __builtin_memcpy(&pair, p + k * kWidth, sizeof pair);
      out[k] = (Vec)(pair << 16);
      out[k + 1] = (Vec)(pair & 0xffff0000u);
    } else {
      out[k] = load<Vec, Partial>(p + k * kWidth, lanes);
    }
  }
}

template <bool Partial, class T, int K>
FASTRES_INLINE void store_vectors(T* p, const Vec (&x)[K], int64_t lanes) {
  for (int k = 0; k < K; ++k) {
    if constexpr (kPaired<T, K, Partial>) {
      if (k % 2) continue;
      const Bits pair = (bf16_bits(x[k]) >> 16) | (bf16_bits(x[k + 1]) & 0xffff0000u);
      __builtin_memcpy(p + k * kWidth, &pair, sizeof pair);
    } else {
      store<Partial>(p + k * kWidth, x[k], lanes);
    }
  }
}

// Floats that belong to K vectors of T: brought into T's lane order, and back.
template <class T, bool Partial, int K>
FASTRES_INLINE void load_floats(const float* p, int64_t lanes, Vec (&out)[K]) {
  for (int k = 0; k < K; ++k) out[k] = load<Vec, Partial>(p + k * kWidth, lanes);
  if constexpr (kPaired<T, K, Partial>) {
    for (int k = 0; k < K; k += 2) split_even_odd(&out[k], &out[k + 1]);
  }
}

template <class T, bool Partial, int K>
FASTRES_INLINE void store_floats(float* p, const Vec (&x)[K], int64_t lanes) {
  Vec out[K];
  for (int k = 0; k < K; ++k) out[k] = x[k];
  if constexpr (kPaired<T, K, Partial>) {
    for (int k = 0; k < K; k += 2) join_even_odd(&out[k], &out[k + 1]);
  }
  for (int k = 0; k < K; ++k) store<Partial>(p + k * kWidth, out[k], lanes);
}

// The sum of the lanes, in double and in a fixed order.
FASTRES_INLINE double sum(Vec x) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}
FASTRES_INLINE double sum(float x) { return x; }

}  // namespace fastres::FASTRES_ISA
