// How a forward problem becomes launches: which flags, which tile.
#pragma once

#include "cuda_forward.cuh"

namespace fastres::cuda {

template <class Tile, class Transform, bool Flat, bool Pointwise>
void launch_forward(const ConvForward& p, void* stream) {
  const Geometry& g = p.shape;
  const int64_t tiles = ceil_div(rows_out(g), Tile::kRows), column_tiles = ceil_div(g.filters, Tile::kColumns);
  ForwardLaunch launch = {p,
                          {},
                          static_cast<int>(column_tiles),
                          static_cast<int>(unit_of(g.channels, p.type, {p.x, p.weight})),
                          unit_of(g.filters, p.type, {p.y, p.residual}) * bytes_of(p.type) == 16};
  launch.map = {{g.dilation_h, g.height}, {g.dilation_w, g.width}, g.filter_height, g.filter_width, g.channels};
  const dim3 grid(static_cast<unsigned>(tiles * column_tiles));
  constexpr int shared = forward_shared_bytes<Tile, Transform, Flat, Pointwise>();
  FASTRES_LAUNCH((conv_forward<Tile, Transform, Flat, Pointwise>), grid, dim3(Tile::kThreads), shared, stream, launch);
  if (p.partial != nullptr) launch_merge(p.partial, tiles, Tile::kRows, rows_out(g), g.filters, p.mean, p.var, stream);
}

template <class T, bool Split, class Transform, bool Flat, bool Pointwise>
void launch_forward_tile(const ConvForward& p, TileShape tile, void* stream) {
  if constexpr (sizeof(T) == 2 && !Flat) {  // elsewhere forward_tile() names the small one
    switch (tile) {
      case TileShape::large: return launch_forward<Tile<T, Split, 128, 128, 32, 64, 3>, Transform, Flat, Pointwise>(p, stream);
      case TileShape::tall: return launch_forward<Tile<T, Split, 128, 64, 32, 64, 3>, Transform, Flat, Pointwise>(p, stream);
      case TileShape::small: break;
    }
  }
  launch_forward<Tile<T, Split, 64, 64, 32, 32, 3>, Transform, Flat, Pointwise>(p, stream);
}

template <class T, bool Split, class Transform>
void launch_forward_kind(const ConvForward& p, TileShape tile, void* stream) {
  if (!wide_rows(p.shape, p.type, {p.x, p.weight})) {
    launch_forward_tile<T, Split, Transform, true, false>(p, tile, stream);
  } else if (is_pointwise(p.shape)) {
    launch_forward_tile<T, Split, Transform, false, true>(p, tile, stream);
  } else {
    launch_forward_tile<T, Split, Transform, false, false>(p, tile, stream);
  }
}

// Queues the kernels of one element type on `stream` (cudaStream_t). The problem has elements and no refusal().
template <class T, bool Split>
void launch_forward_type(const ConvForward& p, TileShape tile, void* stream) {
  if (p.prologue.scale != nullptr) {
    launch_forward_kind<T, Split, Activation>(p, tile, stream);
  } else {
    launch_forward_kind<T, Split, Raw>(p, tile, stream);
  }
}

}  // namespace fastres::cuda
