// How an input gradient becomes launches: which flags, which tile.
#pragma once

#include <numeric>

#include "cuda_input_gradient.cuh"
#include "cuda_sums.cuh"

namespace fastres::cuda {

template <class Tile, class Transform, bool Flat, bool Pointwise>
void launch_input_gradient(const ConvBackward& p, void* stream) {
  const Geometry& g = p.shape;
  const int64_t column_tiles = ceil_div(g.channels, Tile::kColumns), tiles = input_gradient_tiles(g, Tile::kRows);
  const auto unit = [&](int64_t channels, const void* a, const void* b) {
    const int64_t found = unit_of(channels, p.type, {a, b}), most = 8 / bytes_of(p.type);
    return static_cast<int>(found < most ? found : most);
  };
  InputGradientLaunch launch = {};
  launch.p = p;
  launch.column_tiles = static_cast<int>(column_tiles);
  launch.phases_h = phases_of(g.stride_h, g.height);
  launch.phases_w = phases_of(g.stride_w, g.width);
  launch.step_h = g.stride_h / std::gcd(g.stride_h, g.dilation_h);
  launch.step_w = g.stride_w / std::gcd(g.stride_w, g.dilation_w);
  launch.unit_filters = unit(g.filters, p.grad_y, Transform::kMaps > 1 ? p.y : nullptr);
  launch.unit_channels = unit(g.channels, p.weight, nullptr);
  launch.inverse_count = static_cast<float>(1.0 / static_cast<double>(rows_out(g)));
  launch.wide_rows =
      unit_of(g.channels, p.type, {p.prologue.scale != nullptr ? p.x : nullptr, p.addend, p.grad_x}) * bytes_of(p.type) == 16;
  if (p.grad_y == nullptr) launch.p.factor = nullptr;
  const dim3 grid(static_cast<unsigned>(tiles * column_tiles));
  constexpr int shared = input_gradient_shared_bytes<Tile, Transform, Flat, Pointwise>();
  if (tiles > 0) {
    FASTRES_LAUNCH((conv_input_gradient<Tile, Transform, Flat, Pointwise>), grid, dim3(Tile::kThreads), shared, stream, launch);
  }
  if (p.grad_scale != nullptr) launch_sums(p.workspace, tiles, g.channels, p.grad_scale, p.grad_shift, stream);
}

template <class Tile, class Transform>
void launch_input_gradient_kind(const ConvBackward& p, void* stream) {
  if (!input_gradient_wide(p)) {
    if constexpr (Tile::kRows == 64) launch_input_gradient<Tile, Transform, true, false>(p, stream);  // the only tile that is chosen
  } else if (is_pointwise(p.shape)) {
    launch_input_gradient<Tile, Transform, false, true>(p, stream);
  } else {
    launch_input_gradient<Tile, Transform, false, false>(p, stream);
  }
}

template <class Tile>
void launch_input_gradient_tile(const ConvBackward& p, void* stream) {
  if (p.grad_var != nullptr) {
    launch_input_gradient_kind<Tile, Combined<true>>(p, stream);
  } else if (p.grad_mean != nullptr || p.factor != nullptr) {
    launch_input_gradient_kind<Tile, Combined<false>>(p, stream);
  } else {
    launch_input_gradient_kind<Tile, Raw>(p, stream);
  }
}

// Queues the kernels of one element type on `stream` (cudaStream_t). The problem has no refusal(); `tile`: input_gradient_tile(problem),
// or a larger one where rows are wide.
template <class T, bool Split>
void launch_input_gradient_type(const ConvBackward& p, TileShape tile, void* stream) {
  if constexpr (sizeof(T) == 2) {  // floats take the small one
    switch (tile) {
      case TileShape::large: return launch_input_gradient_tile<Tile<T, Split, 128, 128, 32, 64, 3>>(p, stream);
      case TileShape::tall: return launch_input_gradient_tile<Tile<T, Split, 128, 64, 32, 64, 3>>(p, stream);
      case TileShape::small: break;
    }
  }
  launch_input_gradient_tile<Tile<T, Split, 64, 64, 32, 32, 3>>(p, stream);
}

}  // namespace fastres::cuda
