// conv_stats' weight gradient in CUDA: one kernel, whose variants are flags. Maths and bytes: README.md.
#pragma once

#include "cuda_weight_operands.cuh"

namespace fastres::cuda {

struct WeightLaunch {
  ConvBackward p;
  Window map;
  Lattice lattice;                  // its origin is that of tap (0, 0)
  uint32_t pixels;                  // N*P*Q
  float inverse_count;              // of them
  int column_tiles, channel_tiles;  // of all taps, and of one (Flat: of all)
  int steps, each;                  // of the reduction, and of a split
  int unit_filters, unit_channels;  // Flat: elements of K and of C that are aligned together
  bool wide_result;                 // grad_weight, or the slabs, take 16-byte stores
};

// A tile of sums on its way to memory: shared [kRows][kSumPitch] float. Rows of 8 bytes a lane then meet all banks.
template <class Tile>
constexpr int kSumPitch = Tile::kColumns + 8;

template <class Tile, class Transform, class RightTransform, bool Flat>
constexpr int weight_gradient_shared_bytes() {
  using Right = Inputs<Tile, RightTransform, Flat>;
  constexpr int ring = kRingBytes<Gradients<Tile, Transform, Flat>, Right, Tile>;
  constexpr int output = Tile::kRows * kSumPitch<Tile> * 4;
  return Right::kTables * kStep<typename Tile::T> * static_cast<int>(sizeof(Row)) + (ring > output ? ring : output);
}

// Rows x columns of `sums` to `to`, the tile's first element in a matrix with rows of `length`; V elements a store.
template <class Tile, int V, class Out>
FASTRES_DEVICE void store_sums(const float* sums, Out* to, int64_t length, int rows, int columns) {
  constexpr int pieces = Tile::kColumns / V;
  for (int i = threadIdx.x; i < Tile::kRows * pieces; i += Tile::kThreads) {
    const int row = i / pieces, column = i % pieces * V;
    if (row >= rows || column >= columns) continue;
    float x[V];
    load<V>(sums + row * kSumPitch<Tile> + column, x);
    store<V>(to + row * length + column, x);
  }
}

// result[split][k, tap, c] = the sum over the output pixels of one split of G[pixel, k]*act(x)[pixel's input at tap, c].
//
// A block owns kRows filters x kColumns columns, channels of one tap (Flat: of all taps), and the pixels of one split. Grid: (tiles,
// splits). Tiles of a split are neighbours: they read the same pixels. Bytes, if every line comes from memory once: grad_y, y (where
// Transform reads it) and x read; a float slab of grad_weight's size written for each split, or with one split grad_weight. From the second
// cache: grad_y and y once a column tile, x once a tap and row tile.
template <class Tile, class Transform, class RightTransform, bool Flat>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) conv_weight_gradient(WeightLaunch launch) {
  using T = typename Tile::T;
  using Left = Gradients<Tile, Transform, Flat>;
  using Right = Inputs<Tile, RightTransform, Flat>;
  FASTRES_DYNAMIC_SHARED(shared);
  Row* const tables = reinterpret_cast<Row*>(shared);  // [kTables][pixels of a step]
  unsigned char* const ring = shared + Right::kTables * kStep<T> * sizeof(Row);
  const ConvBackward& p = launch.p;
  const Geometry& g = p.shape;
  const int row_tile = static_cast<int>(blockIdx.x) / launch.column_tiles, column_tile = static_cast<int>(blockIdx.x) % launch.column_tiles;
  const int tap = column_tile / launch.channel_tiles;  // Flat: 0
  const int first_filter = row_tile * Tile::kRows, first_column = (column_tile - tap * launch.channel_tiles) * Tile::kColumns;
  const int first_step = static_cast<int>(blockIdx.y) * launch.each;
  const int steps = launch.steps - first_step < launch.each ? launch.steps - first_step : launch.each;
  const uint32_t total = launch.pixels, first_pixel = static_cast<uint32_t>(first_step) * kStep<T>;

  Left left = {{static_cast<const T*>(p.grad_y)},          {}, g.filters, first_filter, total, first_pixel, first_pixel,
               typename Left::Copies(launch.unit_filters), {}};
  if constexpr (Transform::kMaps > 1) {
    left.maps[1] = static_cast<const T*>(p.y);
    left.transform = {{p.factor, p.grad_mean, p.grad_var, p.mean}, launch.inverse_count};
  }
  left.begin();
  Right right = {static_cast<const T*>(p.x),
                 launch.map,
                 launch.lattice,
                 {},
                 first_column,
                 total,
                 first_pixel,
                 typename Right::Copies(launch.unit_channels),
                 tables};
  if constexpr (!Flat) {
    right.map.taps_h = right.map.taps_w = 1;
    right.lattice.origin_h += tap / g.filter_width * g.dilation_h;
    right.lattice.origin_w += tap % g.filter_width * g.dilation_w;
  }
  if constexpr (RightTransform::kVectors > 0)
    right.transform = {{p.prologue.scale, p.prologue.center, p.prologue.shift}, p.prologue_relu ? 0.0f : -INFINITY};
  right.begin();
  Tile tile;
  main_loop(tile, left, right, steps, ring);

  float* const sums = reinterpret_cast<float*>(ring);  // [kRows][kSumPitch]
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const float pair[2] = {tile.acc[i][j][below * 2], tile.acc[i][j][below * 2 + 1]};
        store<2>(sums + Tile::row_of(i, below) * kSumPitch<Tile> + Tile::column_of(j, 0), pair);
      }
    }
  }
  __syncthreads();
  const int width = Flat ? g.filter_height * g.filter_width * g.channels : g.channels;
  const int64_t length = static_cast<int64_t>(g.filter_height) * g.filter_width * g.channels;
  const int64_t at = first_filter * length + static_cast<int64_t>(tap) * g.channels + first_column;
  const int rows = g.filters - first_filter, columns = width - first_column;  // that are left
  if (gridDim.y > 1) {
    float* const to = p.workspace + static_cast<int64_t>(blockIdx.y) * g.filters * length + at;
    launch.wide_result ? store_sums<Tile, 4>(sums, to, length, rows, columns) : store_sums<Tile, 1>(sums, to, length, rows, columns);
  } else {
    T* const to = static_cast<T*>(p.grad_weight) + at;
    launch.wide_result ? store_sums<Tile, kChunk<T>>(sums, to, length, rows, columns)
                       : store_sums<Tile, 1>(sums, to, length, rows, columns);
  }
}

// ---- The sum of the slabs -------------------------------------------------------------------------------------------------------------
constexpr int kSplitThreads = 128;

struct SplitSum {
  const float* slabs;  // [splits][elements]
  void* result;        // [elements] of T
  int64_t elements;
  int splits;
};

// result = the slabs added from the first to the last, rounded once; zeros of no slabs. A thread owns V neighbours, a block
// kSplitThreads*V. Bytes: all slabs read, result written.
template <class T, int V>
__global__ void __launch_bounds__(kSplitThreads) sum_splits(SplitSum s) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x) * V;
  if (at >= s.elements) return;
  float sum[V] = {};
#pragma unroll 8  // loads of as many slabs under way
  for (int split = 0; split < s.splits; ++split) {
    float x[V];
    load<V>(s.slabs + split * s.elements + at, x);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += x[v];
  }
  store<V>(static_cast<T*>(s.result) + at, sum);
}

}  // namespace fastres::cuda
