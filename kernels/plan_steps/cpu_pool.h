// Max and mean over windows, in channels_last: neighbouring lanes are neighbouring channels. Reads every element of x once for each window
// it is in (from the first cache but for the first time), writes y once.
#pragma once

#include "../common/cpu_vec.h"
#include "plan_problems.h"

namespace fastres::FASTRES_ISA {

// Taps [first, last) of one window in one direction; the coordinate of tap t is start + t*step.
struct Taps {
  int64_t start, step, first, last;
};

FASTRES_INLINE Taps taps_of(int64_t out, int64_t stride, int64_t pad, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t start = out * stride - pad;
  const int64_t first = start < 0 ? ceil_div(-start, dilation) : 0;
  const int64_t last = min64(kernel, start < size ? ceil_div(size - start, dilation) : 0);
  return {start, dilation, first, max64(first, last)};
}

FASTRES_INLINE Taps adaptive_taps(int64_t out, int64_t out_size, int64_t size) {
  const int64_t start = out * size / out_size, end = ceil_div((out + 1) * size, out_size);
  return {start, 1, 0, end - start};
}

// What is done with a window's elements. A NaN beats every number, as in torch's max_pool2d.
struct Largest {
  static constexpr float kStart = -__builtin_inff();
  FASTRES_INLINE Vec step(Vec best, Vec x) { return ((x > best) | (x != x)) ? x : best; }
  FASTRES_INLINE Vec finish(Vec best, float) { return best; }
};
struct Mean {
  static constexpr float kStart = 0.0f;
  FASTRES_INLINE Vec step(Vec sum, Vec x) { return sum + x; }
  FASTRES_INLINE Vec finish(Vec sum, float size) { return sum / splat<Vec>(size); }
};

template <class Body, class T, int K, bool Partial>
FASTRES_INLINE void pool_window(const T* x, int64_t row, int64_t pixel, const Taps& h, const Taps& w, float size, int64_t lanes, T* y) {
  Vec acc[K];
  for (int k = 0; k < K; ++k) acc[k] = splat<Vec>(Body::kStart);
  for (int64_t i = h.first; i < h.last; ++i) {
    const T* from = x + (h.start + i * h.step) * row + (w.start + w.first * w.step) * pixel;
    for (int64_t j = w.first; j < w.last; ++j, from += w.step * pixel) {
      Vec in[K];
      load_vectors<Partial>(from, lanes, in);
      for (int k = 0; k < K; ++k) acc[k] = Body::step(acc[k], in[k]);
    }
  }
  for (int k = 0; k < K; ++k) acc[k] = Body::finish(acc[k], size);
  store_vectors<Partial>(y, acc, lanes);
}

// torch's divisor: the window with its padding, but not what ceil_mode adds beyond that; or the window inside the map.
FASTRES_INLINE int64_t counted(int64_t out, int64_t stride, int64_t pad, int64_t kernel, int64_t size, const Taps& t, bool padding) {
  const int64_t start = out * stride - pad;
  return padding ? min64(start + kernel, size + pad) - start : t.last - t.first;
}

template <class Body, class T>
void pool_items(const MapPool& p, int64_t begin, int64_t end) {
  constexpr int64_t kWide = 4 * kWidth;
  const int64_t chunks = pool_chunks(p), row = p.width * p.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item % chunks, oh = item / chunks % p.out_height, image = item / chunks / p.out_height;
    const int64_t c0 = chunk * kPoolChannels, c1 = min64(p.channels, c0 + kPoolChannels);
    const T* x = static_cast<const T*>(p.x) + image * p.height * row;
    T* y = static_cast<T*>(p.y) + (image * p.out_height + oh) * p.out_width * p.channels;
    const Taps h =
        p.adaptive ? adaptive_taps(oh, p.out_height, p.height) : taps_of(oh, p.stride_h, p.pad_h, p.kernel_h, p.dilation_h, p.height);
    for (int64_t ow = 0; ow < p.out_width; ++ow, y += p.channels) {
      const Taps w =
          p.adaptive ? adaptive_taps(ow, p.out_width, p.width) : taps_of(ow, p.stride_w, p.pad_w, p.kernel_w, p.dilation_w, p.width);
      int64_t size = p.divisor;
      if (size == 0 && p.adaptive) size = (h.last - h.first) * (w.last - w.first);
      if (size == 0) {
        size = counted(oh, p.stride_h, p.pad_h, p.kernel_h, p.height, h, p.count_padding) *
               counted(ow, p.stride_w, p.pad_w, p.kernel_w, p.width, w, p.count_padding);
      }
      const float divisor = static_cast<float>(size);
      int64_t c = c0;
      for (; c + kWide <= c1; c += kWide) pool_window<Body, T, 4, false>(x + c, row, p.channels, h, w, divisor, 0, y + c);
      for (; c + kWidth <= c1; c += kWidth) pool_window<Body, T, 1, false>(x + c, row, p.channels, h, w, divisor, 0, y + c);
      if (c < c1) pool_window<Body, T, 1, true>(x + c, row, p.channels, h, w, divisor, c1 - c, y + c);
    }
  }
}

inline void map_max_pool(const MapPool& p, int64_t begin, int64_t end) {
  p.bfloat16 ? pool_items<Largest, bf16>(p, begin, end) : pool_items<Largest, float>(p, begin, end);
}
inline void map_mean_pool(const MapPool& p, int64_t begin, int64_t end) {
  p.bfloat16 ? pool_items<Mean, bf16>(p, begin, end) : pool_items<Mean, float>(p, begin, end);
}

}  // namespace fastres::FASTRES_ISA
