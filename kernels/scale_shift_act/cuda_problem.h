// What the CUDA kernels of scale_shift_act are given, and how a shape is cut into work. Plain C++: no CUDA, no torch.
#pragma once

#include <initializer_list>

#include "../common/cuda_types.h"

namespace fastres::cuda {

enum class Residual : int { none = 0, plain = 1, affine = 2 };

// What is computed: the result; its gradients; or, in place of those of y and of the residual, dz, of which they are multiples.
enum class Pass : int { forward = 0, backward = 1, masked = 2 };

// "y-like" = N*C*H*W elements of `type` in the layout that `planes` names. Pointers that a problem doesn't have are null.
struct PointProblem {
  Type type;
  bool planes;  // contiguous (true) or channels_last (false)
  bool relu;
  Residual residual_kind;
  int64_t images, channels, plane;  // N, C, H*W
  Affine main, res;                 // [C]
  const void* y;                    // y-like
  const void* residual;             // y-like, or null
  void* out;                        // y-like: forward only
  const void* grad;                 // y-like: from here on backward only
  void* grad_y;                     // y-like; dz in the masked pass
  void* grad_residual;              // y-like, or null: not wanted
  float* partial;                   // [parts(problem), sums(problem), C]
  float* sum_out[3];                // [C] each: sum dz*(y-center), sum dz, sum dz*(residual-res_center)
};

constexpr int kPointThreads = 256;
constexpr int kPointBlocks = 2;  // resident on a multiprocessor at least: up to 128 registers a thread, so that none spills
constexpr int kPointWarps = kPointThreads / 32;
constexpr int64_t kPointPiece = 4096;  // elements of a plane that one warp takes
constexpr int64_t kPointRowsPerThread = 16;
constexpr int64_t kPointMaxParts = 1024;

inline int sums(const PointProblem& p) { return p.residual_kind == Residual::affine ? 3 : 2; }

// Elements of one access: 16 bytes where every pointer is aligned to them and they never cross a row or a plane, else one element.
inline int vector_length(const PointProblem& p) {
  const int v = p.type == Type::float32 ? 4 : 8;
  uintptr_t all = 0;
  for (const void* pointer : {p.y, p.residual, static_cast<const void*>(p.out), p.grad, static_cast<const void*>(p.grad_y),
                              static_cast<const void*>(p.grad_residual)}) {
    all |= reinterpret_cast<uintptr_t>(pointer);
  }
  return all % 16 == 0 && (p.planes ? p.plane : p.channels) % v == 0 ? v : 1;
}

// Threads side by side: the smallest power of two that covers the channels, at most a whole warp.
inline int across(const PointProblem& p, int v) {
  int n = 1;
  while (n < 32 && static_cast<int64_t>(n) * v < p.channels) n *= 2;
  return n;
}

// How many partial sums a channel has. Depends on the shape (and on alignment, which only changes who adds what to whom).
inline int64_t parts(const PointProblem& p) {
  if (p.planes) return p.images * ceil_div(p.plane, kPointPiece);
  const int64_t down = kPointThreads / across(p, vector_length(p));
  return clamp(ceil_div(p.images * p.plane, down * kPointRowsPerThread), 1, kPointMaxParts);
}

}  // namespace fastres::cuda
