// conv_stats' and conv_act's forward in CUDA: one kernel, whose variants are flags. Maths and bytes: README.md of both ops.
#pragma once

#include "cuda_gather.cuh"
#include "cuda_merge.cuh"
#include "cuda_output.cuh"

namespace fastres::cuda {

// The right operand: rows of filters, weight [K, R*S*C], along the walk of the left one. Stage: [columns][kPitch bytes].
template <class Tile, bool Flat>
struct Filters {
  using T = typename Tile::T;
  static constexpr int kStageBytes = Tile::kColumns * kPitch;
  const T* weight;
  Window map;
  int filters, first, unit;
  Walk<T, Flat> ahead = {};

  FASTRES_DEVICE void load(unsigned char* stage) {
    const int length = map.taps_h * map.taps_w * map.channels;
    const int chunks = Flat ? kStep<T> / unit : 4, down = Tile::kThreads / chunks, size = Flat ? unit : kChunk<T>;
    const int chunk = static_cast<int>(threadIdx.x) % chunks, c = ahead.c + chunk * size;
    const bool exists = c < (Flat ? length : map.channels);
    const int place = Flat ? c : (ahead.r * map.taps_w + ahead.s) * map.channels + c;
#pragma unroll
    for (int i = 0; i < Tile::kColumns / down; ++i) {
      const int row = static_cast<int>(threadIdx.x) / chunks + i * down;
      const bool valid = exists && first + row < filters;
      const T* const source = weight + (valid ? static_cast<int64_t>(first + row) * length + place : 0);
      unsigned char* const target = stage + row * kPitch + chunk * size * static_cast<int>(sizeof(T));
      if constexpr (Flat) {
        copy_unit(target, source, valid, unit);
      } else {
        copy_async<16>(target, source, valid);
      }
    }
    ahead.next(map);
  }
  FASTRES_DEVICE void fragments(const unsigned char* stage, int half, uint32_t (&b)[Tile::kColumnTiles][2]) const {
    right_rows<Tile>(stage, half, b);
  }
  FASTRES_DEVICE void next() {}
};

struct ForwardLaunch {
  ConvForward p;
  Window map;
  int column_tiles;
  int unit;        // Flat: elements of x's channels and of filters that are aligned together
  bool wide_rows;  // y and residual take 16-byte accesses
};

template <class Tile, class Transform, bool Flat, bool Pointwise>
constexpr int forward_shared_bytes() {
  constexpr int ring = kRingBytes<Gather<Tile, Transform, Flat, Pointwise>, Filters<Tile, Flat>, Tile>;
  constexpr int output = Output<Tile>::kBytes + kSumBytes<Tile>;
  return Tile::kRows * static_cast<int>(sizeof(Row)) + (ring > output ? ring : output);
}

// y = conv(act(scale*(x - center) + shift), weight) [+ bias] [+ residual], ReLU; per row tile the mean and M2 of the rounded y.
//
// A block owns kRows pixels x kColumns filters of y and walks the whole reduction. Bytes, if every line comes from memory once: x, weight
// and residual read, y written, 8 bytes a filter and row tile written. From the second cache: x once a column tile and tap, weight once a
// row tile. Blocks of one row tile are neighbours.
template <class Tile, class Transform, bool Flat, bool Pointwise>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) conv_forward(ForwardLaunch launch) {
  using T = typename Tile::T;
  FASTRES_DYNAMIC_SHARED(shared);
  Row* const rows = reinterpret_cast<Row*>(shared);  // [kRows]
  unsigned char* const ring = shared + Tile::kRows * sizeof(Row);
  const ConvForward& p = launch.p;
  const Geometry& g = p.shape;
  const int64_t total = g.images * g.out_height * g.out_width;
  const int64_t row_tile = blockIdx.x / launch.column_tiles, first_row = row_tile * Tile::kRows;
  const int first_column = static_cast<int>(blockIdx.x % launch.column_tiles) * Tile::kColumns;

  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    const int64_t m = first_row + row;
    Row found = {0, 0, 0};
    if (m < total) {
      if constexpr (Pointwise) {
        found = {m * g.channels, 1, 1};
      } else {
        const uint32_t pixel = static_cast<uint32_t>(m), line = pixel / g.out_width, image = line / g.out_height;
        const int h = static_cast<int>(line - image * g.out_height) * g.stride_h - g.pad_h;
        const int w = static_cast<int>(pixel - line * g.out_width) * g.stride_w - g.pad_w;
        found = row_at(launch.map, image, h, w);
      }
    }
    rows[row] = found;
  }
  __syncthreads();

  Gather<Tile, Transform, Flat, Pointwise> left = {{static_cast<const T*>(p.x)}, launch.map, {}, rows, launch.unit};
  if constexpr (Transform::kVectors > 0)
    left.transform = {{p.prologue.scale, p.prologue.center, p.prologue.shift}, p.prologue_relu ? 0.0f : -INFINITY};
  left.begin();
  Filters<Tile, Flat> right = {static_cast<const T*>(p.weight), launch.map, g.filters, first_column, launch.unit};
  Tile tile;
  main_loop(tile, left, right, Walk<T, Flat>::steps(launch.map), ring);

  const auto row_of = [&](int row) { return first_row + row < total ? first_row + row : int64_t{-1}; };
  const Output<Tile> out = {ring, g.filters, first_column, launch.wide_rows};
  if (p.residual != nullptr) {
    out.fetch(p.residual, row_of);
    out.arrived();
  }
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
    float bias[2] = {};
#pragma unroll
    for (int right_one = 0; right_one < 2; ++right_one) {
      const int k = first_column + Tile::column_of(j, right_one);
      if (p.bias != nullptr && k < g.filters) {
        bias[right_one] = p.bias_type == Type::float32 ? static_cast<const float*>(p.bias)[k] : to_float(static_cast<const T*>(p.bias)[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        T* const place = out.at(Tile::row_of(i, e / 2), Tile::column_of(j, e % 2));
        float z = tile.acc[i][j][e] + bias[e % 2];
        if (p.residual != nullptr) z += to_float(*place);
        if (p.relu && z <= 0.0f) z = 0.0f;
        from_float(z, place);
        tile.acc[i][j][e] = to_float(*place);
      }
    }
  }
  out.store(p.y, row_of);
  if (p.partial == nullptr) return;

  float* const sums = reinterpret_cast<float*>(ring + Output<Tile>::kBytes);  // [kDown][kColumns]
  const float count = static_cast<float>(total - first_row < Tile::kRows ? total - first_row : Tile::kRows);
  const auto live = [&](int i, int e) { return first_row + Tile::row_of(i, e / 2) < total; };
  float means[Tile::kColumnTiles][2];
  sum_columns<Tile>(sums, [&](int i, int j, int e) { return live(i, e) ? tile.acc[i][j][e] : 0.0f; });
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
    means[j][0] = sums[Tile::column_of(j, 0)] / count;
    means[j][1] = sums[Tile::column_of(j, 1)] / count;
  }
  const auto write = [&](int which, float divisor) {
    for (int column = threadIdx.x; column < Tile::kColumns; column += Tile::kThreads) {
      const int k = first_column + column;
      if (k < g.filters) p.partial[(row_tile * 2 + which) * g.filters + k] = sums[column] / divisor;
    }
    __syncthreads();
  };
  write(0, count);
  sum_columns<Tile>(sums, [&](int i, int j, int e) {
    const float apart = tile.acc[i][j][e] - means[j][e % 2];
    return live(i, e) ? apart * apart : 0.0f;
  });
  write(1, 1.0f);
}

}  // namespace fastres::cuda
