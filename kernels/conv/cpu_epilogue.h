// What happens to a tile of sums on its way to y: bias, residual, ReLU; the statistics of what was stored; or, for an input gradient, the
// mask and scale of the activation in front of it with the sums that are its scale's and shift's gradients.
#pragma once

#include "cpu_geometry.h"

namespace fastres::FASTRES_ISA {

enum class Ends : int { act = 0, stats = 1, mask = 2 };

FASTRES_INLINE Ends ends_of(const Conv& c) { return c.pre != nullptr ? Ends::mask : c.stats != nullptr ? Ends::stats : Ends::act; }

constexpr int kStatRows = 4;  // of a task: count, pivot, sum (y - pivot), sum (y - pivot)^2
constexpr int kGradRows = 2;  // of a task: sum dz*(pre - center), sum dz

// Sums of a task, in its scratch: [rows, K rounded up to blocks].
struct Sums {
  float* rows;
  int64_t stride;
};

// y as stored. The hardware's conversion flushes denormals, which no network can tell from zero.
FASTRES_INLINE Vec store_rounded(float* p, Vec x) {
  store(p, x);
  return x;
}
FASTRES_INLINE Vec store_rounded(bf16* p, Vec x) {
#if defined(__AVX512BF16__)
  const HalfBits half = (HalfBits)_mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(p, &half, sizeof half);
  return (Vec)(__builtin_convertvector(half, Bits) << 16);
#else
  const Bits bits = bf16_bits(x);
  const HalfBits half = __builtin_convertvector(bits >> 16, HalfBits);
  __builtin_memcpy(p, &half, sizeof half);
  return (Vec)(bits & 0xffff0000u);
#endif
}

// One tile of one block: acc [count, row] floats, of which channels [k0, k0 + lanes) are the block's.
template <class T, Ends E, bool HasResidual, bool Partial>
FASTRES_INLINE void finish_vectors(const Conv& c, const Tile& t, const float* acc, int64_t row, int64_t k0, int64_t lanes, Sums sums) {
  const int64_t K = c.shape.out_channels;
  Vec bias{}, scale{}, center{}, shift{}, pivot{}, first{}, second{};
  if (c.bias != nullptr) bias = load<Vec, Partial>(c.bias + k0, lanes);
  if constexpr (E == Ends::mask) {
    scale = load<Vec, Partial>(c.out_scale + k0, lanes);
    center = load<Vec, Partial>(c.out_center + k0, lanes);
    shift = load<Vec, Partial>(c.out_shift + k0, lanes);
  }
  float* row0 = sums.rows + k0;
  if constexpr (E == Ends::stats) pivot = load<Vec, Partial>(row0 + sums.stride, lanes);
  bool has_pivot = E == Ends::stats && row0[0] > 0;
  const Vec low = splat<Vec>(c.relu ? 0.0f : -__builtin_inff());
  T* y = static_cast<T*>(c.y) + k0;
  const T* residual = static_cast<const T*>(c.residual) + k0;
  const T* pre = static_cast<const T*>(c.pre) + k0;
  for (int32_t j = 0; j < t.count; ++j) {
    if (t.out[j] < 0) continue;
    const int64_t at = t.out[j] * K;
    Vec x = load<Vec, false>(acc + j * row, kWidth) + bias;
    if constexpr (HasResidual) x += load<Vec, Partial>(residual + at, lanes);
    if constexpr (E == Ends::mask) {
      const Vec centered = load<Vec, Partial>(pre + at, lanes) - center;
      if (c.out_relu) x = where_positive(fma(scale, centered, shift), x);
      first = fma(x, centered, first);
      second += x;
      x = x * scale;
    } else {
      x = (x < low) ? low : x;  // keeps NaN
    }
    if constexpr (Partial) {
      store<true>(y + at, x, lanes);
      x = rounded<T>(x);
    } else {
      x = store_rounded(y + at, x);
    }
    if constexpr (E == Ends::stats) {
      if (!has_pivot) {
        pivot = x;
        has_pivot = true;
      }
      const Vec d = x - pivot;
      first += d;
      second = fma(d, d, second);
    }
  }
  if constexpr (E == Ends::act) return;
  constexpr int at = E == Ends::stats ? 2 : 0;
  if constexpr (E == Ends::stats) {
    store<Partial>(row0, load<Vec, Partial>(row0, lanes) + splat<Vec>(static_cast<float>(t.stored)), lanes);
    store<Partial>(row0 + sums.stride, pivot, lanes);
  }
  store<Partial>(row0 + at * sums.stride, load<Vec, Partial>(row0 + at * sums.stride, lanes) + first, lanes);
  store<Partial>(row0 + (at + 1) * sums.stride, load<Vec, Partial>(row0 + (at + 1) * sums.stride, lanes) + second, lanes);
}

// Two vectors side by side where nothing is summed: one pass over the tile's pixels, whole cache lines.
template <class T, bool HasResidual>
FASTRES_INLINE void finish_pair(const Conv& c, const Tile& t, const float* acc, int64_t row, int64_t k0) {
  const int64_t K = c.shape.out_channels;
  Vec bias[2] = {};
  if (c.bias != nullptr) {
    for (int i = 0; i < 2; ++i) load(c.bias + k0 + i * kWidth, &bias[i]);
  }
  const Vec low = splat<Vec>(c.relu ? 0.0f : -__builtin_inff());
  T* y = static_cast<T*>(c.y) + k0;
  const T* residual = static_cast<const T*>(c.residual) + k0;
  for (int32_t j = 0; j < t.count; ++j) {
    if (t.out[j] < 0) continue;
    const int64_t at = t.out[j] * K;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(bf16)) {  // 32 channels are one load of the residual and one store
      Vec x[2], r[2] = {};
      load(acc + j * row, &x[0]);
      load(acc + j * row + kWidth, &x[1]);
      if constexpr (HasResidual) {
        load(residual + at, &r[0]);
        load(residual + at + kWidth, &r[1]);
      }
      for (int i = 0; i < 2; ++i) {
        x[i] += bias[i];
        if constexpr (HasResidual) x[i] += r[i];
        x[i] = (Vec)_mm512_max_ps((__m512)low, (__m512)x[i]);  // NaN in the second operand stays
      }
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
      __builtin_memcpy(y + at, &both, sizeof both);
      continue;
    }
#endif
    for (int i = 0; i < 2; ++i) {
      Vec x, r;
      load(acc + j * row + i * kWidth, &x);
      x += bias[i];
      if constexpr (HasResidual) {
        load(residual + at + i * kWidth, &r);
        x += r;
      }
      store_rounded(y + at + i * kWidth, (x < low) ? low : x);
    }
  }
}

// A tile of one block of `channels` channels (whole vectors and a remainder).
template <class T, Ends E, bool HasResidual>
FASTRES_INLINE void finish_tile(const Conv& c, const Tile& t, const float* acc, int64_t row, int64_t k0, int64_t channels, Sums sums) {
  int64_t k = 0;
  if constexpr (E == Ends::act) {
    for (; k + 2 * kWidth <= channels; k += 2 * kWidth) finish_pair<T, HasResidual>(c, t, acc + k, row, k0 + k);
  }
  for (; k + kWidth <= channels; k += kWidth) finish_vectors<T, E, HasResidual, false>(c, t, acc + k, row, k0 + k, kWidth, sums);
  if (k < channels) finish_vectors<T, E, HasResidual, true>(c, t, acc + k, row, k0 + k, channels - k, sums);
}

FASTRES_INLINE int64_t sum_rows(const Conv& c) { return ends_of(c) == Ends::stats ? kStatRows : ends_of(c) == Ends::mask ? kGradRows : 0; }

// The task's sums, from its scratch to its row of the caller's [tasks, rows, K]; channels of other splits stay as the caller left them.
FASTRES_INLINE void publish_sums(const Conv& c, Sums sums, int64_t task, int64_t from, int64_t to) {
  const int64_t K = c.shape.out_channels, rows = sum_rows(c);
  float* out = (c.pre != nullptr ? c.grad_sums : c.stats) + task * rows * K;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = from; k < to && k < K; ++k) out[r * K + k] = sums.rows[r * sums.stride + k];
  }
}

// Calls f with the epilogue's flags as template arguments.
template <class F>
FASTRES_INLINE void with_ends(const Conv& c, F&& f) {
  const bool residual = c.residual != nullptr;
  switch (ends_of(c)) {
    case Ends::act: return residual ? f.template operator()<Ends::act, true>() : f.template operator()<Ends::act, false>();
    case Ends::stats: return f.template operator()<Ends::stats, false>();
    case Ends::mask: return f.template operator()<Ends::mask, false>();
  }
}

}  // namespace fastres::FASTRES_ISA
