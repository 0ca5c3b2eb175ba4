// Plain data that the CUDA problems share. Plain C++: no CUDA, no torch.
#pragma once

#include <stdint.h>

namespace fastres::cuda {

enum class Type : int { float32, float16, bfloat16 };

inline int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Per-channel vectors of scale*(x - center) + shift, [C] float32 each; null pointers: no such map.
struct Affine {
  const float* scale;
  const float* center;
  const float* shift;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

constexpr int64_t kMaxGrid = 0x7fffffff;

}  // namespace fastres::cuda
