// Decisions about conv_stats' gradients that need no GPU. Plain C++.
#pragma once

#include "../conv/cuda_shape.h"

namespace fastres::cuda {

// ---- Input gradient -------------------------------------------------------------------------------------------------------------------
// Whether rows of grad_y, y and weight take 16-byte copies.
inline bool input_gradient_wide(const ConvBackward& p) {
  const int64_t whole = 16 / bytes_of(p.type);
  const void* const y = p.grad_var != nullptr ? p.y : nullptr;
  return unit_of(p.shape.filters, p.type, {p.grad_y, y}) == whole && unit_of(p.shape.channels, p.type, {p.weight}) == whole;
}

// Phases of a stride along one axis, input pixels alike modulo the stride; those past the map have no pixels.
inline int phases_of(int stride, int size) { return stride < size ? stride : size; }

inline int64_t phases_of(const Geometry& g) {
  return static_cast<int64_t>(phases_of(g.stride_h, g.height)) * phases_of(g.stride_w, g.width);
}
inline int64_t largest_phase(const Geometry& g) { return g.images * ceil_div(g.height, g.stride_h) * ceil_div(g.width, g.stride_w); }

inline TileShape input_gradient_tile(const ConvBackward& p) {
  if (p.type == Type::float32 || !input_gradient_wide(p)) return TileShape::small;
  return tile_of(largest_phase(p.shape) * phases_of(p.shape), p.shape.channels);
}

// Tiles of `rows` pixels in all phases; every phase counts as many as the largest has.
inline int64_t input_gradient_tiles(const Geometry& g, int64_t rows) { return ceil_div(largest_phase(g), rows) * phases_of(g); }

// Floats of ConvBackward::workspace for the sums; grad_y, y, grad_var, weight and grad_scale must be set.
inline int64_t input_gradient_workspace(const ConvBackward& p) {
  if (p.grad_scale == nullptr) return 0;
  return merge_workspace(input_gradient_tiles(p.shape, rows_of(input_gradient_tile(p))), p.shape.channels);
}

// Null, or why the kernels don't serve a shape.
inline const char* input_gradient_refusal(const Geometry& g) {
  if (const char* const reason = refusal(g)) return reason;
  return input_gradient_tiles(g, 64) * ceil_div(g.channels, 64) > kMaxGrid ? "2^31 tiles of the input gradient or more" : nullptr;
}

}  // namespace fastres::cuda
