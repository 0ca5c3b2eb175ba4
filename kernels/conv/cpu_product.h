// The inner product of the vector kernels: a tile of positions times two vectors of output channels, in registers.
#pragma once

#include "cpu_panel.h"

namespace fastres::FASTRES_ISA {

#if defined(__AVX512F__)
constexpr int kDirectTile = 14;  // x 2 vectors = 28 of 32 registers
#else
constexpr int kDirectTile = 6;  // x 2 vectors = 12 of 16 registers
#endif
constexpr int64_t kDirectBlock = 2 * kWidth;

#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

// How one word of K is multiplied: a float, or a pair of bf16. Four bytes either way.
template <bool Pairs>
struct Product {
  using Panel = FloatPanel;
  static constexpr int kDepth = 1;
  FASTRES_INLINE Vec accumulate(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Product<true> {
  using Panel = HalfPanel;
  static constexpr int kDepth = 2;
  FASTRES_INLINE Vec accumulate(Vec a, Vec b, Vec acc) { return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

FASTRES_INLINE Vec broadcast_word(const char* p) {
  int32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return (Vec)(x - Mask{});
}

struct ProductTile {
  const char* a;           // the first position
  int64_t stride;          // bytes from position to position
  const int64_t* offsets;  // [runs] bytes from a to each run of K
  int64_t runs, words;     // words of K in each run
  const float* u;          // [runs][words][2 vectors]: the block's weights
  float* acc;              // [positions][2 vectors]
  bool first;              // acc is written, not added to
  // With Prefetch: weights that come next, `next_step` floats for each word, go into the second cache meanwhile. Spread evenly, or the
  // loads that are needed now would queue behind them.
  const float* next;
  int64_t next_step;
};

template <bool Pairs, bool Prefetch, int M>
__attribute__((noinline)) void product_tile(const ProductTile& t) {
  using P = Product<Pairs>;
  Vec sum[M][2] = {};
  const int64_t words = t.words, stride = t.stride, stride3 = 3 * stride, next_step = t.next_step;
  const float *u = t.u, *next = t.next;
  for (int64_t r = 0; r < t.runs; ++r) {
    // Four positions share a base address, so that few address registers are needed.
    const char* base[(M + 3) / 4];
    for (int i = 0; i < (M + 3) / 4; ++i) base[i] = t.a + t.offsets[r] + 4 * i * stride;
    for (int64_t k = 0; k < words; ++k) {
      Vec w0, w1;
      load(u, &w0);
      load(u + kWidth, &w1);
      if constexpr (Prefetch) {
        __builtin_prefetch(next, 0, 2);
        next += next_step;
      }
      u += 2 * kWidth;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const int64_t step = m % 4 == 0 ? 0 : m % 4 == 1 ? stride : m % 4 == 2 ? 2 * stride : stride3;
        const Vec x = broadcast_word(base[m / 4] + step + 4 * k);
        sum[m][0] = P::accumulate(x, w0, sum[m][0]);
        sum[m][1] = P::accumulate(x, w1, sum[m][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 2; ++i) {
      float* at = t.acc + m * 2 * kWidth + i * kWidth;
      Vec before{};
      if (!t.first) load(at, &before);
      store(at, sum[m][i] + before);
    }
  }
}

// The instance for a tile of `count` positions.
template <bool Pairs, bool Prefetch, int M = kDirectTile>
FASTRES_INLINE void product_of(int64_t count, const ProductTile& t) {
  if constexpr (M > 1) {
    if (count < M) return product_of<Pairs, Prefetch, M - 1>(count, t);
  }
  product_tile<Pairs, Prefetch, M>(t);
}

}  // namespace fastres::FASTRES_ISA
