// Multiply-adds that never leave the registers, and reads that compute nothing:
// the limits that a roofline compares with.
#pragma once

#include "../common/cpu_tiles.h"
#include "../common/cpu_vec.h"
#include "machine_kernels.h"

#if defined(__AVX512F__)
#define FASTRES_REGISTER "+v"
#elif defined(__x86_64__)
#define FASTRES_REGISTER "+x"
#elif defined(__aarch64__)
#define FASTRES_REGISTER "+w"
#else
#define FASTRES_REGISTER "+g"
#endif

namespace fastres::FASTRES_ISA {

// Two units of latency 4 or 5 need ten chains; twelve and two operands still
// fit sixteen registers.
constexpr int kChains = 12;

// The compiler must take every chain as changed after each round, in a
// register.
template <class V, class Step>
FASTRES_INLINE void run_chains(int64_t rounds, V start, Step step) {
  V a0 = start, a1 = start, a2 = start, a3 = start, a4 = start, a5 = start;
  V a6 = start, a7 = start, a8 = start, a9 = start, a10 = start, a11 = start;
  for (int64_t i = 0; i < rounds; ++i) {
    a0 = step(a0), a1 = step(a1), a2 = step(a2), a3 = step(a3), a4 = step(a4), a5 = step(a5);
    a6 = step(a6), a7 = step(a7), a8 = step(a8), a9 = step(a9), a10 = step(a10), a11 = step(a11);
    asm volatile(""
                 : FASTRES_REGISTER(a0), FASTRES_REGISTER(a1), FASTRES_REGISTER(a2), FASTRES_REGISTER(a3), FASTRES_REGISTER(a4),
                   FASTRES_REGISTER(a5), FASTRES_REGISTER(a6), FASTRES_REGISTER(a7), FASTRES_REGISTER(a8), FASTRES_REGISTER(a9),
                   FASTRES_REGISTER(a10), FASTRES_REGISTER(a11));
  }
}

static int64_t multiply_add(int64_t rounds) {
  Vec x = splat<Vec>(1.0f), y = splat<Vec>(0.25f);
  asm volatile("" : FASTRES_REGISTER(x),
                    FASTRES_REGISTER(y));  // no constants to the compiler
  run_chains(rounds, y, [&](Vec a) { return fma(x, y, a); });
  return rounds * kChains * kWidth * 2;
}

#if defined(__AVX512BF16__)
static int64_t multiply_add_bf16(int64_t rounds) {
  Bits ones = Bits{} + 0x3f803f80u;
  asm volatile("" : FASTRES_REGISTER(ones));
  const __m512bh x = (__m512bh)ones;
  run_chains(rounds, Vec{}, [&](Vec a) { return (Vec)_mm512_dpbf16_ps((__m512)a, x, x); });
  return rounds * kChains * kWidth * 4;
}
#endif

#if defined(__AMX_BF16__)
// Four tiles of sums from two by two tiles of operands, as in a product of
// matrices.
static int64_t multiply_tiles(int64_t rounds) {
  configure_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return rounds * 4 * (16 * 16 * 32 * 2);
}
#endif

static void read_buffer(const void* p, int64_t bytes) {
  const float* at = static_cast<const float*>(p);
  const float* const end = at + bytes / static_cast<int64_t>(sizeof(float));
  constexpr int kAtOnce = 8;
  for (; at < end; at += kAtOnce * kWidth) {
    for (int k = 0; k < kAtOnce; ++k) {
      Vec x;
      load(at + k * kWidth, &x);
      asm volatile("" : FASTRES_REGISTER(x));
    }
  }
}

static const MachineKernels machine_kernels = {
    multiply_add,
#if defined(__AVX512BF16__)
    multiply_add_bf16,
#else
    nullptr,
#endif
#if defined(__AMX_BF16__)
    multiply_tiles,
#else
    nullptr,
#endif
    read_buffer,
};

}  // namespace fastres::FASTRES_ISA
