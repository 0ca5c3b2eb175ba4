// How conv_stats' weight gradient is cut into blocks. Plain C++: no CUDA, no torch.
#pragma once

#include "../conv/cuda_shape.h"

namespace fastres::cuda {

constexpr int64_t kSlabBytes = 64 << 20;   // of workspace at most
constexpr int64_t kWeightBlocks = 512;     // worth aiming for: a few for each multiprocessor; more only cost workspace traffic
constexpr int64_t kFewestWeightSteps = 8;  // of the reduction that a split should have at least
constexpr int64_t kFewChannels = 32;       // columns run over all taps, where one's channels fill no more than half a tile

// n / divisor for any n < 2^31 by one multiplication, see divide().
struct Divisor {
  uint32_t multiplier, shift;
};
inline Divisor divisor_of(int divisor) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < static_cast<uint64_t>(divisor)) ++shift;
  const uint64_t rest = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>((rest << 32) / static_cast<uint64_t>(divisor) + 1), shift};
}

struct WeightPlan {
  bool flat;              // columns run over all taps' channels together, copies may be narrow; else columns are channels of one tap
  TileShape tile;         // filters x columns
  int64_t row_tiles;      // of K
  int64_t channel_tiles;  // of C, for one tap; flat: of R*S*C
  int64_t column_tiles;   // of all taps
  int64_t steps;          // of the reduction: N*P*Q pixels, a few at a time
  int64_t splits, each;   // steps of a split; the last has what is left
};

inline bool weight_gradient_flat(const ConvBackward& p) {
  const Geometry& g = p.shape;
  const void* const y = p.grad_var != nullptr ? p.y : nullptr;
  if (unit_of(g.channels, p.type, {p.x}) * bytes_of(p.type) < 16) return true;
  if (unit_of(g.filters, p.type, {p.grad_y, y}) * bytes_of(p.type) < 16) return true;
  return g.channels <= kFewChannels && g.filter_height * g.filter_width > 1;
}

inline WeightPlan weight_plan_of(const ConvBackward& p, bool flat, TileShape tile) {
  const Geometry& g = p.shape;
  const int64_t taps = static_cast<int64_t>(g.filter_height) * g.filter_width, elements = g.filters * taps * g.channels;
  const int64_t columns = tile == TileShape::large ? 128 : 64;
  WeightPlan plan = {flat, tile, ceil_div(g.filters, rows_of(tile)), ceil_div(flat ? taps * g.channels : g.channels, columns), 0, 0, 1, 0};
  plan.column_tiles = flat ? plan.channel_tiles : taps * plan.channel_tiles;
  plan.steps = ceil_div(rows_out(g), 64 / bytes_of(p.type));
  const int64_t tiles = plan.row_tiles * plan.column_tiles, by_steps = plan.steps / kFewestWeightSteps;
  if (tiles == 0 || plan.steps == 0) return plan;
  const int64_t by_blocks = kWeightBlocks / tiles, by_bytes = kSlabBytes / (4 * elements);
  const int64_t least = by_blocks < by_bytes ? by_blocks : by_bytes;
  plan.each = ceil_div(plan.steps, clamp(by_steps, 1, least < 1 ? 1 : least));
  plan.splits = ceil_div(plan.steps, plan.each);
  return plan;
}

// The largest tile that fills its rows and columns and still gives many blocks: it reads the least per product.
inline WeightPlan weight_plan(const ConvBackward& p) {
  constexpr int64_t many = 256;
  const bool flat = weight_gradient_flat(p);
  if (p.type != Type::float32 && !flat && p.shape.filters > 64) {
    for (const TileShape tile : {TileShape::large, TileShape::tall}) {
      if (tile == TileShape::large && p.shape.channels <= 64) continue;
      const WeightPlan plan = weight_plan_of(p, flat, tile);
      if (plan.row_tiles * plan.column_tiles * plan.splits >= many) return plan;
    }
  }
  return weight_plan_of(p, flat, TileShape::small);
}

// Floats of workspace: the slabs of several splits. The problem's inputs are set: where they lie decides how they are cut.
inline int64_t weight_gradient_workspace(const ConvBackward& p) {
  const WeightPlan plan = weight_plan(p);
  const Geometry& g = p.shape;
  return plan.splits < 2 ? 0 : plan.splits * g.filters * g.filter_height * g.filter_width * g.channels;
}

}  // namespace fastres::cuda
