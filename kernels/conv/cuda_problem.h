// What the CUDA convolution kernels are given, and how a shape is cut into blocks. Plain C++: no CUDA, no torch.
//
// Maps are NHWC: x [N, H, W, C], y [N, P, Q, K]; weights [K, R, S, C]. One group. Every pointer that a problem doesn't have is null.
#pragma once

#include "../common/cuda_types.h"

namespace fastres::cuda {

// float32 products: TF32 (operands cut to 19 bits), or exact to float32 by three TF32 products of split operands.
enum class Precision : int { tf32, float32 };

struct Geometry {
  int64_t images;                      // N
  int channels, height, width;         // C, H, W
  int filters, out_height, out_width;  // K, P, Q
  int filter_height, filter_width;     // R, S
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// y = conv(act(scale*(x - center) + shift), weight) [+ bias] [+ residual], ReLU; and the statistics of y.
struct ConvForward {
  Type type;
  Precision precision;
  Geometry shape;
  const void* x;       // [N, H, W, C]
  const void* weight;  // [K, R, S, C]
  Affine prologue;     // [C]
  bool prologue_relu;
  Type bias_type;
  const void* bias;      // [K] of bias_type
  const void* residual;  // [N, P, Q, K] of `type`
  bool relu;             // after bias and residual
  void* y;               // [N, P, Q, K], written
  float* partial;        // [statistics_workspace(problem)] written; null: no statistics
  float* mean;           // [K], written with statistics
  float* var;            // [K], written with statistics: biased
};

// Gradients of ConvForward without bias, residual and ReLU. G = factor*grad_y + grad_mean/n + 2*grad_var/n*(y - mean), n = N*P*Q.
struct ConvBackward {
  Type type;
  Precision precision;
  Geometry shape;
  const void* grad_y;      // [N, P, Q, K], or null
  const void* y;           // [N, P, Q, K], read where grad_var is not null
  const float* mean;       // [K]
  const float* grad_mean;  // [K], or null
  const float* grad_var;   // [K], or null
  const float* factor;     // [K], or null
  const void* x;           // [N, H, W, C]
  const void* weight;      // [K, R, S, C]
  Affine prologue;         // [C]
  bool prologue_relu;
  const void* addend;  // [N, H, W, C], or null: added to grad_x
  void* grad_x;        // [N, H, W, C]: scale*dz + addend, dz = the input gradient of G under the ReLU's mask
  float* grad_scale;   // [C]: sum dz*(x - center); null without a prologue
  float* grad_shift;   // [C]: sum dz
  void* grad_weight;   // [K, R, S, C] of `type`
  float* workspace;    // of the size that the launch asks for
};

inline int64_t rows_in(const Geometry& g) { return g.images * g.height * g.width; }
inline int64_t rows_out(const Geometry& g) { return g.images * g.out_height * g.out_width; }

}  // namespace fastres::cuda
