// Sums of row tiles become those of the map, in a fixed order.
#pragma once

#include "../conv/cuda_slices.cuh"

namespace fastres::cuda {

// `partial` [tiles][2][channels] float.
struct SumTiles {
  const float* partial;
  float* first;   // [channels]; before the last level: [groups][2][channels]
  float* second;  // [channels], written by the last level
  int tiles, channels;
};

// Adds up kMergeTiles neighbouring tiles for 32 of the 2*channels columns a block, in double. Grid: (groups of 32 columns, groups of
// tiles). Thread (lane, slice): one column, every kMergeSlices-th tile. Bytes: partial read, a kMergeTiles-th of it written.
template <bool Final>
__global__ void __launch_bounds__(kMergeThreads) sum_tiles(SumTiles s) {
  __shared__ double shared[kMergeSlices][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, slice = static_cast<int>(threadIdx.x) / kWarp;
  const int width = 2 * s.channels, column = static_cast<int>(blockIdx.x) * kWarp + lane;
  const int first = static_cast<int>(blockIdx.y * kMergeTiles);
  const int last = first + kMergeTiles < s.tiles ? first + static_cast<int>(kMergeTiles) : s.tiles;
  double sum = 0;
  if (column < width) {
    for (int tile = first + slice; tile < last; tile += kMergeSlices) sum += s.partial[static_cast<int64_t>(tile) * width + column];
  }
  sum = add_slices(shared, sum);
  if (slice != 0 || column >= width) return;
  if constexpr (Final) {
    (column < s.channels ? s.first[column] : s.second[column - s.channels]) = static_cast<float>(sum);
  } else {
    s.first[static_cast<int64_t>(blockIdx.y) * width + column] = static_cast<float>(sum);
  }
}

// first and second [channels] from partial [tiles][2][channels] with merge_workspace(tiles, channels) behind it. No tiles: zeros.
inline void launch_sums(float* partial, int64_t tiles, int channels, float* first, float* second, void* stream) {
  for (;;) {
    const int64_t groups = tiles > kMergeTiles ? ceil_div(tiles, kMergeTiles) : 1;
    float* const next = partial + tiles * 2 * channels;
    const dim3 grid(static_cast<unsigned>(ceil_div(2 * static_cast<int64_t>(channels), kWarp)), static_cast<unsigned>(groups));
    SumTiles sums = {partial, first, second, static_cast<int>(tiles), channels};
    if (groups == 1) {
      FASTRES_LAUNCH(sum_tiles<true>, grid, dim3(kMergeThreads), 0, stream, sums);
      return;
    }
    sums.first = next;
    FASTRES_LAUNCH(sum_tiles<false>, grid, dim3(kMergeThreads), 0, stream, sums);
    partial = next;
    tiles = groups;
  }
}

}  // namespace fastres::cuda
