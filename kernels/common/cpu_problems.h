// What the CPU kernels are given: pointers and shapes, nothing of torch. C = channels, P = parts_of(shape) (cpu_shape.h). "y-like" means
// the shape's N*C*H*W elements in the shape's layout, float or bf16 as `bfloat16` says. A pointer that may be absent is null then.
#pragma once

#include "cpu_shape.h"

namespace fastres {

enum class Residual : int { none = 0, plain = 1, affine = 2 };

// scale*(x - center) + shift, per channel.
struct Affine {
  const float* scale;   // [C]
  const float* center;  // [C]
  const float* shift;   // [C]
};

struct ScaleShiftAct {
  Shape shape;
  bool bfloat16;
  bool relu;
  Residual residual_kind;
  Affine main;
  Affine res;            // null pointers unless residual_kind is affine
  const void* y;         // y-like
  const void* residual;  // y-like, or null
  void* out;             // y-like
};

struct ScaleShiftActBackward {
  Shape shape;
  bool bfloat16;
  bool relu;
  Residual residual_kind;
  Affine main;
  Affine res;
  const void* grad;      // y-like
  const void* y;         // y-like
  const void* residual;  // y-like, or null
  void* grad_y;          // y-like
  void* grad_residual;   // y-like, or null: not wanted
  float* partial;        // [P, 3, C] (affine residual) or [P, 2, C]: sum dz*(y-center), sum dz, sum dz*(residual-res_center)
};

struct Window {
  int64_t kernel, stride, padding;  // square; padding <= kernel/2, kernel*kernel <= 255
  int64_t out_height, out_width;    // OH, OW (floor mode)
};

struct ScaleShiftActPool {
  Shape shape;  // of y
  bool bfloat16;
  bool relu;
  Affine main;
  Window window;
  const void* y;   // y-like
  void* out;       // [N, C, OH, OW] in y's layout and dtype
  uint8_t* index;  // [N, C, OH, OW] in y's layout: written by the pool, read by the gather
};

struct ScaleShiftActPoolBackward {
  Shape shape;  // of y
  bool bfloat16;
  bool relu;
  Affine main;
  Window window;
  const void* grad;      // [N, C, OH, OW] in y's layout and dtype
  const uint8_t* index;  // [N, C, OH, OW] in y's layout
  const void* y;         // y-like
  void* grad_y;          // y-like
  float* partial;        // [P, 2, C]: sum dz*(y-center), sum dz
};

struct ChannelStats {
  Shape shape;
  bool bfloat16;
  const void* y;   // y-like
  float* partial;  // [P, 3, C]: pivot, sum (y-pivot), sum (y-pivot)^2
};

struct ChannelStatsBackward {
  Shape shape;
  bool bfloat16;
  const void* grad_y;   // y-like, or null (zero)
  const void* y;        // y-like
  const float* mean;    // [C]
  const float* offset;  // [C]: grad_mean/n
  const float* slope;   // [C]: 2*grad_var/n
  void* out;            // y-like
};

}  // namespace fastres
