// What every CPU convolution kernel is given and what it offers. N images, C input and K output channels, R x S taps, P x Q outputs.
// Activations are channels_last in memory; nothing here knows torch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/cpu_shape.h"

namespace fastres {

struct ConvShape {
  int64_t images;                      // N
  int64_t height, width, in_channels;  // x [N, H, W, C]
  int64_t out_height, out_width;       // y [N, P, Q, K]
  int64_t out_channels;
  int64_t kernel_h, kernel_w;                // R, S
  int64_t stride_h, stride_w, pad_h, pad_w;  // zero padding, after the prologue
  int64_t dilation_h, dilation_w;
  int64_t groups;  // divides C and K
};

// One convolution: y = act(conv(prologue(x), w) + bias + residual), and what training adds to it. Absent pointers are null.
struct Conv {
  ConvShape shape;
  bool bfloat16;  // dtype of x, residual, y (and of grad pieces below); float otherwise. Everything else is float.
  bool relu;
  bool part;  // only output rows [first_row, first_row + shape.out_height) of the convolution; y points at the first of them
  int64_t first_row;
  bool packed_for_one;   // weights are packed for this call alone, so that packing must be cheap
  int threads;           // how many threads share the tasks: 1 asks for the largest blocks
  const void* x;         // [N, H, W, C]
  const void* weights;   // packed by this kernel for this shape's C, K, R, S, groups and dtype
  const float* bias;     // [K]
  const void* residual;  // [N, P, Q, K]
  void* y;               // [N, P, Q, K]

  // Prologue: x is read as act(scale*(x - center) + shift), per channel of C (null scale: as it is).
  const float* scale;
  const float* center;
  const float* shift;
  bool prologue_relu;
  // Prologue of a gradient: x is read as x + offset + slope*(raw - mean), per channel of C (null offset: as it is).
  const void* raw;  // [N, H, W, C]
  const float* mean;
  const float* offset;
  const float* slope;

  // Statistics epilogue: partial sums of the rounded y about a pivot, one row of [3, K] (pivot, sum, sum of squares) per task.
  float* stats;
  // Mask epilogue (input gradients): y is multiplied by [act input > 0] where the activation input is
  // out_scale*(pre - out_center) + out_shift, then by out_scale; sums of dz*(pre - out_center) and dz go to grad_sums, one row of
  // [2, K] per task.
  const void* pre;  // [N, P, Q, K]
  const float* out_scale;
  const float* out_center;
  const float* out_shift;
  bool out_relu;
  float* grad_sums;
};

// Weights as the caller holds them: element (k, c, tap) of [K, C/groups, R*S] is data[k*out + c*in + tap*tap_stride], with the taps
// reversed for an input gradient. So contiguous, channels_last and transposed weights are packed from where they are.
struct WeightView {
  const float* data;
  int64_t out, in, tap_stride;
  bool reversed;
};

static inline WeightView contiguous_weights(const ConvShape& s, const float* data) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  return {data, s.in_channels / s.groups * taps, taps, 1, false};
}

// One algorithm. All functions are pure: they may be called from any thread at once.
struct ConvKernel {
  const char* name;
  // Null where the kernel serves the problem, else why it doesn't. Only the presence of pointers is looked at, not what they hold.
  const char* (*refusal)(const Conv&);
  // Weights: packed size, and packing in independent items [begin, end) of pack_items.
  int64_t (*packed_bytes)(const ConvShape&, bool bfloat16);
  int64_t (*pack_items)(const ConvShape&, bool bfloat16);
  void (*pack)(const ConvShape&, bool bfloat16, const WeightView& weight, void* packed, int64_t begin, int64_t end);
  // The work: independent tasks, each run by one thread with its own scratch of scratch_bytes, 64-byte aligned, contents arbitrary.
  int64_t (*scratch_bytes)(const Conv&);
  int64_t (*tasks)(const Conv&);
  void (*run)(const Conv&, int64_t begin, int64_t end, void* scratch);
  // Whether a problem it serves suits it; where it does not, a kernel behind it is preferred. Null: always.
  bool (*suits)(const Conv&);
};

// The gradient of the weights of conv(prologue(x), w): input is the forward's problem (shape, x and prologue), gradient describes grad_y
// with the share of the statistics as something that is read (x: grad_y; raw, mean, offset, slope; shape.in_channels: K).
struct WeightGradient {
  Conv input;
  Conv gradient;
};

struct WeightGradientKernel {
  const char* name;
  const char* (*refusal)(const WeightGradient&);
  int64_t (*scratch_bytes)(const WeightGradient&);  // per thread, as for ConvKernel
  int64_t (*tasks)(const WeightGradient&);
  int64_t (*groups)(const WeightGradient&);  // partial sums that tasks write to, each of `elements` floats
  int64_t (*elements)(const WeightGradient&);
  void (*run)(const WeightGradient&, int64_t task, void* scratch, float* partial);
  // The partial sums of all groups, added in order, to where `dw` says (not reversed); blocks of 32 output channels [begin, end).
  void (*finish)(const WeightGradient&, const float* partial, const WeightView& dw, int64_t begin, int64_t end);
};

struct ConvKernels {
  const ConvKernel* const* list;  // in order of preference where nothing was measured
  int64_t count;
  const WeightGradientKernel* weight_gradient;  // or null: this instruction set has none
};

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fastres
