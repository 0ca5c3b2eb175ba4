// Decisions about convolution problems that need no GPU: alignment, tiles, workspaces, what can't be served. Plain C++.
#pragma once

#include <initializer_list>

#include "cuda_problem.h"

namespace fastres::cuda {

enum class TileShape : int { small, tall, large };  // 64 x 64, 128 x 64, 128 x 128

inline bool is_pointwise(const Geometry& g) {
  return g.filter_height == 1 && g.filter_width == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
}

// Elements, a power of two of up to 16 bytes, that rows of `channels` from all of `pointers` are aligned to.
inline int64_t unit_of(int64_t channels, Type type, std::initializer_list<const void*> pointers) {
  const int64_t size = bytes_of(type);
  uint64_t all = static_cast<uint64_t>(channels * size) | 16;
  for (const void* pointer : pointers) all |= reinterpret_cast<uint64_t>(pointer);
  return static_cast<int64_t>(all & (~all + 1)) / size;  // the lowest bit
}

// Whether rows of x and of the weights take 16-byte copies; the kernels' flag Flat is the opposite.
inline bool wide_rows(const Geometry& g, Type type, std::initializer_list<const void*> pointers) {
  return unit_of(g.channels, type, pointers) * bytes_of(type) == 16;
}

// A large tile reads the least per product, but only many of them fill a GPU; more than a hundred multiprocessors are common.
inline TileShape tile_of(int64_t rows, int64_t columns) {
  constexpr int64_t many = 256;
  if (columns > 64 && ceil_div(rows, 128) * ceil_div(columns, 128) >= many) return TileShape::large;
  return ceil_div(rows, 128) * ceil_div(columns, 64) >= many ? TileShape::tall : TileShape::small;
}
inline int64_t rows_of(TileShape tile) { return tile == TileShape::small ? 64 : 128; }

inline TileShape forward_tile(const ConvForward& p) {
  if (p.type == Type::float32 || !wide_rows(p.shape, p.type, {p.x, p.weight})) return TileShape::small;
  return tile_of(rows_out(p.shape), p.shape.filters);
}

constexpr int64_t kMergeTiles = 128;  // tiles that a block of the second kernel merges

// Floats that all levels of a merge of `tiles` tiles need, one behind the other.
inline int64_t merge_workspace(int64_t tiles, int64_t channels) {
  int64_t all = tiles;
  for (; tiles > kMergeTiles; all += tiles) tiles = ceil_div(tiles, kMergeTiles);
  return all * 2 * channels;
}

// Floats of ConvForward::partial; x and weight must be set.
inline int64_t forward_workspace(const ConvForward& p) {
  return merge_workspace(ceil_div(rows_out(p.shape), rows_of(forward_tile(p))), p.shape.filters);
}

// Null, or why the kernels don't serve a shape.
inline const char* refusal(const Geometry& g) {
  if (g.filter_height > 32 || g.filter_width > 32) return "filters larger than 32 x 32";
  if (rows_in(g) >= kMaxGrid || rows_out(g) >= kMaxGrid) return "maps of 2^31 pixels or more";
  const int64_t length = static_cast<int64_t>(g.filter_height) * g.filter_width * (g.channels > g.filters ? g.channels : g.filters);
  if (length >= kMaxGrid / 2) return "filters of 2^30 elements or more";
  return nullptr;
}

}  // namespace fastres::cuda
