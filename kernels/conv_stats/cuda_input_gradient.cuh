// conv_stats' input gradient in CUDA: one kernel, whose variants are flags. Maths and bytes: README.md.
#pragma once

#include "../conv/cuda_gather.cuh"
#include "../conv/cuda_output.cuh"
#include "cuda_shape.h"

namespace fastres::cuda {

// The taps that meet the input pixels i*stride + phase, on one axis: first + j*step with j < count and step = stride/gcd(stride, dilation).
// They meet pixel i in output row i + offset - j*dilation/gcd(stride, dilation).
struct Phase {
  int first, count, offset;
  FASTRES_DEVICE Phase(int phase, int taps, int stride, int pad, int dilation, int step) : first(0), count(0), offset(0) {
    for (int tap = 0; tap < step && tap < taps; ++tap) {
      const int distance = phase + pad - tap * dilation;
      if (distance % stride != 0) continue;  // of either sign
      first = tap, count = (taps - tap + step - 1) / step, offset = distance / stride;
      return;
    }
  }
};

// The right operand: columns of weight [K, R*S, C], along the walk of the left one. Stage: [elements of a step][columns], pitched.
template <class Tile, bool Flat>
struct FilterColumns {
  using T = typename Tile::T;
  static constexpr int kPitchBytes = kColumnPitch<T, Tile::kColumns>;
  static constexpr int kStageBytes = kStep<T> * kPitchBytes;
  const T* weight;
  Window map;                     // of the left operand: taps of the phase, K channels
  int first_tap, step_h, step_w;  // the phase's taps among all: first_tap + r*step_h + s*step_w
  int taps, channels;             // R*S, C
  int first;                      // channel of the tile
  int unit;                       // Flat: neighbours in C that are aligned together, up to 8 bytes
  Walk<T, Flat> ahead = {};

  FASTRES_DEVICE const T* at(int k, int r, int s, int c) const {
    return weight + (static_cast<int64_t>(k) * taps + first_tap + r * step_h + s * step_w) * channels + c;
  }

  FASTRES_DEVICE void load(unsigned char* stage) {
    if constexpr (Flat) {
      const int length = map.taps_h * map.taps_w * map.channels, pieces = Tile::kColumns / unit;
      for (int i = threadIdx.x; i < kStep<T> * pieces; i += Tile::kThreads) {
        const int row = i / pieces, column = i % pieces * unit;
        const bool valid = ahead.c + row < length && first + column < channels;
        const Place p(map, valid ? ahead.c + row : 0);
        copy_unit(stage + row * kPitchBytes + column * static_cast<int>(sizeof(T)), valid ? at(p.c, p.r, p.s, first + column) : weight,
                  valid, unit);
      }
    } else {
      constexpr int chunks = Tile::kColumns / kChunk<T>, down = Tile::kThreads / chunks;
      static_assert(kStep<T> % down == 0);
      const int chunk = static_cast<int>(threadIdx.x) % chunks, c = first + chunk * kChunk<T>;
#pragma unroll
      for (int i = 0; i < kStep<T> / down; ++i) {
        const int row = static_cast<int>(threadIdx.x) / chunks + i * down, k = ahead.c + row;
        const bool valid = k < map.channels && c < channels;
        copy_async<16>(stage + row * kPitchBytes + chunk * 16, valid ? at(k, ahead.r, ahead.s, c) : weight, valid);
      }
    }
    ahead.next(map);
  }
  FASTRES_DEVICE void fragments(const unsigned char* stage, int half, uint32_t (&b)[Tile::kColumnTiles][2]) const {
    right_columns<Tile>(stage, half, b);
  }
  FASTRES_DEVICE void next() {}
};

struct InputGradientLaunch {
  ConvBackward p;
  int column_tiles;
  int phases_h, phases_w;           // that have pixels
  int step_h, step_w;               // between the taps of a phase
  int unit_filters, unit_channels;  // Flat: elements of K in grad_y and y, and of C in weight, that are aligned together
  float inverse_count;              // 1/n
  bool wide_rows;                   // x, addend and grad_x take 16-byte accesses
};

// Shared memory: rows [kRows], targets [kRows], then the ring; when the ring is done with, in its place a tile of x that becomes one of
// grad_x, a tile of addend, and sums.
template <class Tile, class Transform, bool Flat, bool Pointwise>
constexpr int input_gradient_shared_bytes() {
  constexpr int ring = kRingBytes<Gather<Tile, Transform, Flat, Pointwise>, FilterColumns<Tile, Flat>, Tile>;
  constexpr int output = 2 * Output<Tile>::kBytes + kSumBytes<Tile>;
  return Tile::kRows * static_cast<int>(sizeof(Row) + sizeof(int)) + (ring > output ? ring : output);
}

// grad_x = scale*dz [+ addend], dz = the sum over the taps that meet a pixel and over K of G*weight, where the pre-activation is positive;
// per row tile sum dz*(x - center) and sum dz, to workspace [row tiles][2][C].
//
// A block owns kRows pixels of one phase (alike modulo the stride: they meet the same taps) x kColumns channels of grad_x, and walks those
// taps and K. A phase that no tap meets has no steps, and its zeros take the same epilogue. Bytes, if every line comes from memory once:
// grad_y, y (Combined<true>), weight, x (prologue) and addend read, grad_x written, with a prologue 8 bytes a channel and row tile written.
// From the second cache: grad_y and y once a column tile and tap, weight once a row tile. Blocks of one row tile, then those of its phases,
// are neighbours: they read the same part of grad_y.
template <class Tile, class Transform, bool Flat, bool Pointwise>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) conv_input_gradient(InputGradientLaunch launch) {
  using T = typename Tile::T;
  FASTRES_DYNAMIC_SHARED(shared);
  Row* const rows = reinterpret_cast<Row*>(shared);                 // [kRows]
  int* const targets = reinterpret_cast<int*>(rows + Tile::kRows);  // [kRows]: the row's pixel in grad_x, or -1
  unsigned char* const ring = reinterpret_cast<unsigned char*>(targets + Tile::kRows);
  const ConvBackward& p = launch.p;
  const Geometry& g = p.shape;
  const int part = static_cast<int>(blockIdx.x) / launch.column_tiles;  // row tile of all phases
  const int first_column = static_cast<int>(blockIdx.x) % launch.column_tiles * Tile::kColumns;
  const int phases = launch.phases_h * launch.phases_w, phase = part % phases;
  const int phase_h = phase / launch.phases_w, phase_w = phase % launch.phases_w;
  const int height = (g.height - phase_h + g.stride_h - 1) / g.stride_h;  // of this phase
  const int width = (g.width - phase_w + g.stride_w - 1) / g.stride_w;
  const int64_t pixels = g.images * height * width, first_row = static_cast<int64_t>(part / phases) * Tile::kRows;

  const Phase met_h(phase_h, g.filter_height, g.stride_h, g.pad_h, g.dilation_h, launch.step_h);
  const Phase met_w(phase_w, g.filter_width, g.stride_w, g.pad_w, g.dilation_w, launch.step_w);
  const Window map = {{-(g.dilation_h * launch.step_h / g.stride_h), g.out_height},
                      {-(g.dilation_w * launch.step_w / g.stride_w), g.out_width},
                      met_h.count,
                      met_w.count,
                      g.filters};
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    const int64_t m = first_row + row;
    Row found = {0, 0, 0};
    int target = -1;
    if (m < pixels) {
      if constexpr (Pointwise) {
        found = {m * g.filters, 1, 1};
        target = static_cast<int>(m);
      } else {
        const uint32_t pixel = static_cast<uint32_t>(m), line = pixel / width, image = line / height;
        const int h = static_cast<int>(line - image * height), w = static_cast<int>(pixel - line * width);
        found = row_at(map, image, h + met_h.offset, w + met_w.offset);
        target = static_cast<int>((image * g.height + h * g.stride_h + phase_h) * g.width + w * g.stride_w + phase_w);
      }
    }
    rows[row] = found;
    targets[row] = target;
  }
  __syncthreads();

  Gather<Tile, Transform, Flat, Pointwise> left = {{static_cast<const T*>(p.grad_y)}, map, {}, rows, launch.unit_filters};
  if constexpr (Transform::kMaps > 1) left.maps[1] = static_cast<const T*>(p.y);
  if constexpr (Transform::kVectors > 0) {
    left.transform.vectors[0] = p.factor;
    left.transform.vectors[1] = p.grad_mean;
    if constexpr (Transform::kMaps > 1) left.transform.vectors[2] = p.grad_var, left.transform.vectors[3] = p.mean;
    left.transform.inverse_count = launch.inverse_count;
  }
  left.begin();
  FilterColumns<Tile, Flat> right = {static_cast<const T*>(p.weight),
                                     map,
                                     met_h.first * g.filter_width + met_w.first,
                                     launch.step_h * g.filter_width,
                                     launch.step_w,
                                     g.filter_height * g.filter_width,
                                     g.channels,
                                     first_column,
                                     launch.unit_channels};
  Tile tile;
  main_loop(tile, left, right, first_row < pixels ? Walk<T, Flat>::steps(map) : 0, ring);

  const auto row_of = [&](int row) { return static_cast<int64_t>(targets[row]); };
  const Output<Tile> out = {ring, g.channels, first_column, launch.wide_rows};
  const Output<Tile> other = {ring + Output<Tile>::kBytes, g.channels, first_column, launch.wide_rows};
  const bool affine = p.prologue.scale != nullptr, add = p.addend != nullptr;
  if (affine) out.fetch(p.x, row_of);
  if (add) other.fetch(p.addend, row_of);
  if (affine || add) Output<Tile>::arrived();
  const auto entry = [&](const float* vector, int j, int right_one) {
    const int c = first_column + Tile::column_of(j, right_one);
    return c < g.channels ? vector[c] : 0.0f;
  };
  if (affine) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int right_one = 0; right_one < 2; ++right_one) {
        const float scale = entry(p.prologue.scale, j, right_one), center = entry(p.prologue.center, j, right_one);
        const float shift = entry(p.prologue.shift, j, right_one);
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            const int row = Tile::row_of(i, below);
            const float z = fmaf(scale, to_float(*out.at(row, Tile::column_of(j, right_one))) - center, shift);
            float& dz = tile.acc[i][j][below * 2 + right_one];
            if (targets[row] < 0 || (p.prologue_relu && !(z > 0.0f))) dz = 0.0f;  // rows past the end may hold junk
          }
        }
      }
    }
    if (p.grad_scale != nullptr) {
      float* const sums = reinterpret_cast<float*>(ring + 2 * Output<Tile>::kBytes);  // [kDown][kColumns]
      const auto write = [&](int which) {
        for (int column = threadIdx.x; column < Tile::kColumns; column += Tile::kThreads) {
          const int c = first_column + column;
          if (c < g.channels) p.workspace[(static_cast<int64_t>(part) * 2 + which) * g.channels + c] = sums[column];
        }
      };
      sum_columns<Tile>(sums, [&](int i, int j, int e) {
        const float x = to_float(*out.at(Tile::row_of(i, e / 2), Tile::column_of(j, e % 2)));
        return tile.acc[i][j][e] * (x - entry(p.prologue.center, j, e % 2));
      });
      write(0);
      __syncthreads();
      sum_columns<Tile>(sums, [&](int i, int j, int e) { return tile.acc[i][j][e]; });
      write(1);
    }
  }
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
    for (int right_one = 0; right_one < 2; ++right_one) {
      const float scale = affine ? entry(p.prologue.scale, j, right_one) : 1.0f;
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int row = Tile::row_of(i, below), column = Tile::column_of(j, right_one);
          const float added = add ? to_float(*other.at(row, column)) : 0.0f;
          from_float(fmaf(scale, tile.acc[i][j][below * 2 + right_one], added), out.at(row, column));
        }
      }
    }
  }
  out.store(p.grad_x, row_of);
}

}  // namespace fastres::cuda
