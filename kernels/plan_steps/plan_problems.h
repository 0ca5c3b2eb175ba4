// What the plan's pointwise CPU kernels are given: pointers and shapes, nothing of torch. All maps are [N, H, W, C], float or bf16 as
// `bfloat16` says; N is known to whoever counts the items.
#pragma once

#include "../common/cpu_shape.h"

namespace fastres {

// y[n, p, q, c] = max or mean over a window of x[n, :, :, c].
struct MapPool {
  int64_t height, width, channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t divisor;     // mean: 0 takes the size of the window
  bool adaptive;       // mean: windows cut the map into out_height x out_width pieces, the fields above don't count
  bool count_padding;  // mean: padding belongs to the window's size
  bool bfloat16;
  const void* x;
  void* y;
};

// y[n, h, w, c] = x[n*stride_n + c*stride_c + h*stride_h + w*stride_w], strides in elements.
struct MapInput {
  int64_t height, width, channels;
  int64_t stride_n, stride_c, stride_h, stride_w;
  bool bfloat16;
  const void* x;
  void* y;
};

// y[n, p, q, k] = x[n, first_h + p*stride_h, first_w + q*stride_w, first_c + k], zero where x has no such element.
struct MapPlace {
  int64_t height, width, channels, out_height, out_width, out_channels;
  int64_t first_h, first_w, first_c, stride_h, stride_w;
  bool bfloat16;
  const void* x;
  void* y;
};

// An item of a pool is one row of the output in one chunk of channels, so that also a 1x1 output has work for several threads. Items of
// the others are rows of the output.
constexpr int64_t kPoolChannels = 256;
static inline int64_t pool_chunks(const MapPool& p) { return ceil_div(p.channels, kPoolChannels); }
static inline int64_t items_of(const MapPool& p, int64_t images) { return images * p.out_height * pool_chunks(p); }
static inline int64_t items_of(const MapInput& p, int64_t images) { return images * p.height; }
static inline int64_t items_of(const MapPlace& p, int64_t images) { return images * p.out_height; }

}  // namespace fastres
