// Statistics of tiles become those of the map: Chan, Golub and LeVeque's merge, in a fixed order.
#pragma once

#include "cuda_slices.cuh"

namespace fastres::cuda {

// `partial` [tiles][2][channels]: mean and M2 = sum (y - mean)^2 of each tile; a tile has `rows` rows, the last what is left of `total`.
struct Merge {
  const float* partial;
  float* mean;  // [channels]; before the last level: [groups][2][channels], mean and M2
  float* var;   // [channels], written by the last level
  int64_t total;
  int64_t rows;
  int tiles, channels;
};

// Merges kMergeTiles neighbouring tiles for 32 channels a block. Grid: (groups of 32 channels, groups of tiles). Thread (lane, slice): one
// channel, every kMergeSlices-th tile. Bytes: partial read twice (the second time from the caches), a kMergeTiles-th of it written.
// Sums in double, relative to the group's first mean, so that the merged mean and M2 lose nothing.
template <bool Final>
__global__ void __launch_bounds__(kMergeThreads) merge_statistics(Merge m) {
  __shared__ double shared[kMergeSlices][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, slice = static_cast<int>(threadIdx.x) / kWarp;
  const int channel = static_cast<int>(blockIdx.x) * kWarp + lane;
  const int first = static_cast<int>(blockIdx.y * kMergeTiles);
  const int last = first + kMergeTiles < m.tiles ? first + static_cast<int>(kMergeTiles) : m.tiles;
  const bool exists = channel < m.channels;
  const auto rows_of = [&](int tile) {
    const int64_t left = m.total - tile * m.rows;
    return static_cast<double>(left < m.rows ? left : m.rows);
  };
  const auto entry = [&](int tile, int which) {
    return static_cast<double>(m.partial[(static_cast<int64_t>(tile) * 2 + which) * m.channels + channel]);
  };
  const double origin = exists ? entry(first, 0) : 0;
  const int64_t left = m.total - first * m.rows, most = m.rows * kMergeTiles;
  const double count = static_cast<double>(left < most ? left : most);
  double moved = 0;
  for (int tile = first + slice; exists && tile < last; tile += kMergeSlices) moved += rows_of(tile) * (entry(tile, 0) - origin);
  const double shift = add_slices(shared, moved) / count;
  double squares = 0;
  for (int tile = first + slice; exists && tile < last; tile += kMergeSlices) {
    const double apart = entry(tile, 0) - origin - shift;
    squares += entry(tile, 1) + rows_of(tile) * apart * apart;
  }
  squares = add_slices(shared, squares);
  if (slice != 0 || !exists) return;
  const int64_t group = blockIdx.y;
  if constexpr (Final) {
    m.mean[channel] = static_cast<float>(origin + shift);
    m.var[channel] = static_cast<float>(squares / count);
  } else {
    m.mean[group * 2 * m.channels + channel] = static_cast<float>(origin + shift);
    m.mean[(group * 2 + 1) * m.channels + channel] = static_cast<float>(squares);
  }
}

// mean and var [channels] of `total` rows from partial [tiles][2][channels] with its workspace behind it.
inline void launch_merge(float* partial, int64_t tiles, int64_t rows, int64_t total, int channels, float* mean, float* var, void* stream) {
  for (;;) {
    const int64_t groups = ceil_div(tiles, kMergeTiles);
    float* const next = partial + tiles * 2 * channels;
    const dim3 grid(static_cast<unsigned>(ceil_div(channels, kWarp)), static_cast<unsigned>(groups));
    Merge m = {partial, mean, var, total, rows, static_cast<int>(tiles), channels};
    if (groups == 1) {
      FASTRES_LAUNCH(merge_statistics<true>, grid, dim3(kMergeThreads), 0, stream, m);
      return;
    }
    m.mean = next;
    FASTRES_LAUNCH(merge_statistics<false>, grid, dim3(kMergeThreads), 0, stream, m);
    partial = next;
    tiles = groups;
    rows *= kMergeTiles;
  }
}

}  // namespace fastres::cuda
