// Copies that change the layout: the network's input from any strides into channels_last, and the option-A shortcut (every s-th position,
// more channels) with its relatives, cropping and zero padding. Elements are copied as they are: reads and writes each once.
#pragma once

#include "../common/cpu_vec.h"
#include "plan_problems.h"

namespace fastres::FASTRES_ISA {

// Rows of C interleaved planes; a constant C lets the compiler use shuffles.
template <int64_t C, class E>
FASTRES_INLINE void interleave(const E* x, int64_t stride_c, int64_t width, E* __restrict y) {
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t c = 0; c < C; ++c) y[w * C + c] = x[c * stride_c + w];
  }
}

template <class E>
FASTRES_INLINE void input_row(const MapInput& p, const E* x, E* y) {
  const int64_t C = p.channels;
  if (p.stride_c == 1 && p.stride_w == C) {
    __builtin_memcpy(y, x, static_cast<size_t>(p.width * C) * sizeof(E));
  } else if (C == 3 && p.stride_w == 1) {
    interleave<3>(x, p.stride_c, p.width, y);
  } else {
    constexpr int64_t kTile = 16;  // positions whose channels stay in the first cache
    for (int64_t w0 = 0; w0 < p.width; w0 += kTile) {
      const int64_t w1 = min64(p.width, w0 + kTile);
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t w = w0; w < w1; ++w) y[w * C + c] = x[c * p.stride_c + w * p.stride_w];
      }
    }
  }
}

template <class E>
void input_items(const MapInput& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item % p.height, image = item / p.height;
    input_row(p, static_cast<const E*>(p.x) + image * p.stride_n + h * p.stride_h, static_cast<E*>(p.y) + item * p.width * p.channels);
  }
}

template <class E>
void place_items(const MapPlace& p, int64_t begin, int64_t end) {
  // Output channels [k0, k1) have a source.
  const int64_t k0 = min64(p.out_channels, max64(0, -p.first_c));
  const int64_t k1 = max64(k0, min64(p.out_channels, p.channels - p.first_c));
  const auto bytes = [](int64_t n) { return static_cast<size_t>(n) * sizeof(E); };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / p.out_height, h = p.first_h + item % p.out_height * p.stride_h;
    E* y = static_cast<E*>(p.y) + item * p.out_width * p.out_channels;
    for (int64_t q = 0; q < p.out_width; ++q, y += p.out_channels) {
      const int64_t w = p.first_w + q * p.stride_w;
      if (h < 0 || h >= p.height || w < 0 || w >= p.width) {
        __builtin_memset(y, 0, bytes(p.out_channels));
        continue;
      }
      const E* x = static_cast<const E*>(p.x) + ((image * p.height + h) * p.width + w) * p.channels + p.first_c;
      __builtin_memset(y, 0, bytes(k0));
      __builtin_memcpy(y + k0, x + k0, bytes(k1 - k0));
      __builtin_memset(y + k1, 0, bytes(p.out_channels - k1));
    }
  }
}

inline void map_input(const MapInput& p, int64_t begin, int64_t end) {
  p.bfloat16 ? input_items<uint16_t>(p, begin, end) : input_items<uint32_t>(p, begin, end);
}
inline void map_place(const MapPlace& p, int64_t begin, int64_t end) {
  p.bfloat16 ? place_items<uint16_t>(p, begin, end) : place_items<uint32_t>(p, begin, end);
}

}  // namespace fastres::FASTRES_ISA
