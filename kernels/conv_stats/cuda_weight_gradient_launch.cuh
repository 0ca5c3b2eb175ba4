// How a weight gradient becomes launches: which flags, which tile, how many splits.
#pragma once

#include "cuda_weight_gradient.cuh"

namespace fastres::cuda {

template <class T>
void launch_sum_splits(const ConvBackward& p, int64_t elements, int64_t splits, void* stream) {
  const SplitSum sum = {p.workspace, p.grad_weight, elements, static_cast<int>(splits)};
  // Four elements a thread: its loads are 16 bytes, and few elements still give many blocks.
  const bool wide = unit_of(elements, Type::float32, {p.workspace}) == 4 && unit_of(elements, p.type, {p.grad_weight}) >= 4;
  const dim3 grid(static_cast<unsigned>(ceil_div(elements, kSplitThreads * (wide ? 4 : 1))));
  if (wide) {
    FASTRES_LAUNCH((sum_splits<T, 4>), grid, dim3(kSplitThreads), 0, stream, sum);
  } else {
    FASTRES_LAUNCH((sum_splits<T, 1>), grid, dim3(kSplitThreads), 0, stream, sum);
  }
}

template <class Tile, class Transform, class RightTransform, bool Flat>
void launch_weight_gradient(const ConvBackward& p, const WeightPlan& plan, void* stream) {
  using T = typename Tile::T;
  const Geometry& g = p.shape;
  const int64_t length = static_cast<int64_t>(g.filter_height) * g.filter_width * g.channels;
  const bool slabs = plan.splits > 1;
  const Type stored = slabs ? Type::float32 : p.type;
  const void* const result = slabs ? p.workspace : p.grad_weight;
  WeightLaunch launch = {};
  launch.p = p;
  if (p.grad_var == nullptr) launch.p.y = nullptr, launch.p.mean = nullptr;  // its term counts as zero
  if (p.grad_y == nullptr) launch.p.factor = nullptr;
  launch.map = {{g.dilation_h, g.height}, {g.dilation_w, g.width}, g.filter_height, g.filter_width, g.channels};
  launch.lattice = {
      divisor_of(g.out_width), divisor_of(g.out_height), g.out_width, g.out_height, g.stride_h, g.stride_w, -g.pad_h, -g.pad_w};
  launch.pixels = static_cast<uint32_t>(rows_out(g));
  launch.inverse_count = static_cast<float>(1.0 / static_cast<double>(rows_out(g)));
  launch.column_tiles = static_cast<int>(plan.column_tiles);
  launch.channel_tiles = static_cast<int>(plan.channel_tiles);
  launch.steps = static_cast<int>(plan.steps);
  launch.each = static_cast<int>(plan.each);
  launch.unit_filters = static_cast<int>(unit_of(g.filters, p.type, {launch.p.grad_y, launch.p.y}));
  launch.unit_channels = static_cast<int>(unit_of(g.channels, p.type, {p.x}));
  launch.wide_result = unit_of(Flat ? length : g.channels, stored, {result}) * bytes_of(stored) == 16;
  const dim3 grid(static_cast<unsigned>(plan.row_tiles * plan.column_tiles), static_cast<unsigned>(plan.splits));
  constexpr int shared = weight_gradient_shared_bytes<Tile, Transform, RightTransform, Flat>();
  FASTRES_LAUNCH((conv_weight_gradient<Tile, Transform, RightTransform, Flat>), grid, dim3(Tile::kThreads), shared, stream, launch);
  if (slabs) launch_sum_splits<T>(p, g.filters * length, plan.splits, stream);
}

template <class T, bool Split, class Transform, class RightTransform>
void launch_weight_gradient_kind(const ConvBackward& p, void* stream) {
  const WeightPlan plan = weight_plan(p);
  using Small = Tile<T, Split, 64, 64, 32, 32, 3>;
  if (plan.flat) return launch_weight_gradient<Small, Transform, RightTransform, true>(p, plan, stream);
  if constexpr (sizeof(T) == 2) {  // else it is the small one
    using Large = Tile<T, Split, 128, 128, 32, 64, 3>;
    using Tall = Tile<T, Split, 128, 64, 32, 64, 3>;
    switch (plan.tile) {
      case TileShape::large: return launch_weight_gradient<Large, Transform, RightTransform, false>(p, plan, stream);
      case TileShape::tall: return launch_weight_gradient<Tall, Transform, RightTransform, false>(p, plan, stream);
      case TileShape::small: break;
    }
  }
  launch_weight_gradient<Small, Transform, RightTransform, false>(p, plan, stream);
}

// Queues the kernels of one element type on `stream` (cudaStream_t). No pixels: zeros. The problem has no refusal().
template <class T, bool Split>
void launch_weight_gradient_type(const ConvBackward& p, void* stream) {
  const Geometry& g = p.shape;
  const int64_t elements = static_cast<int64_t>(g.filters) * g.filter_height * g.filter_width * g.channels;
  if (elements == 0) return;
  if (rows_out(g) == 0) return launch_sum_splits<T>(p, elements, 0, stream);
  const bool raw = p.grad_mean == nullptr && p.grad_var == nullptr && p.factor == nullptr, plain = p.prologue.scale == nullptr;
  if (raw && plain) {
    launch_weight_gradient_kind<T, Split, Raw, Raw>(p, stream);
  } else if (raw) {
    launch_weight_gradient_kind<T, Split, Raw, Activation>(p, stream);
  } else if (plain) {
    launch_weight_gradient_kind<T, Split, Combined<true>, Raw>(p, stream);
  } else {
    launch_weight_gradient_kind<T, Split, Combined<true>, Activation>(p, stream);
  }
}

}  // namespace fastres::cuda
