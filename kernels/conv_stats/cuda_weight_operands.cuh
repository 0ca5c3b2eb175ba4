// Operands of the weight gradient, whose rows and columns are filters and channels: the reduction runs over output pixels.
#pragma once

#include <type_traits>

#include "../conv/cuda_gather.cuh"
#include "cuda_weight_shape.h"

namespace fastres::cuda {

// n < 2^31
FASTRES_DEVICE uint32_t divide(uint32_t n, Divisor by) {
  return (static_cast<uint32_t>(static_cast<uint64_t>(by.multiplier) * n >> 32) + n) >> by.shift;
}

// How a block's threads share the copies of a step: a thread copies the same `unit` of Width neighbours for several pixels.
template <class T, int Threads, int Width, bool Narrow>
struct Share {
  static constexpr int kPitch = kColumnPitch<T, Width>;
  int unit, column, first, down;  // the thread copies columns [column, column + unit) of pixels first, first + down, ..

  FASTRES_DEVICE explicit Share(int narrow_unit) : unit(Narrow ? narrow_unit : kChunk<T>) {
    const int pieces = Width / unit, thread = static_cast<int>(threadIdx.x);
    column = thread % pieces * unit, first = thread / pieces, down = Threads / pieces;
  }
  // To `shared` [pixels of a step][kPitch bytes]. place(pixel, &valid): where the columns' neighbours lie.
  template <class Place>
  FASTRES_DEVICE void copy(unsigned char* shared, Place place) const {
    unsigned char* const target = shared + column * static_cast<int>(sizeof(T));
    if constexpr (Narrow) {
      for (int pixel = first; pixel < kStep<T>; pixel += down) {
        bool valid;
        const T* const source = place(pixel, &valid);
        if (unit == kChunk<T>) {
          copy_async<16>(target + pixel * kPitch, source, valid);
        } else {
          copy_unit(target + pixel * kPitch, source, valid, unit);
        }
      }
    } else {
      constexpr int apart = Threads * kChunk<T> / Width;
      static_assert(kStep<T> % apart == 0);
#pragma unroll
      for (int i = 0; i < kStep<T> / apart; ++i) {
        const int pixel = first + i * apart;
        bool valid;
        const T* const source = place(pixel, &valid);
        copy_async<16>(target + pixel * kPitch, source, valid);
      }
    }
  }
};

// An operand register of this lane holds the elements of a step's pixels pixel_of(half, side) and, of 16 bits, the one behind it.
template <class Tile>
FASTRES_DEVICE int pixel_of(int half, int side) {
  using T = typename Tile::T;
  return half * (kStep<T> / 2) + side * (kStep<T> / 4) + Tile::lane() % 4 * kPerRegister<T>;
}

// All bits of an element, as wide as it.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// ---- The left operand: G, columns of filters ------------------------------------------------------------------------------------------
// Stage: maps [kMaps][pixels of a step][pitch]. Narrow: copies of `unit` elements.
template <class Tile, class Transform, bool Narrow>
struct Gradients {
  using T = typename Tile::T;
  using Copies = Share<T, Tile::kThreads, Tile::kRows, Narrow>;
  static constexpr int kMapBytes = kStep<T> * Copies::kPitch;
  static constexpr int kStageBytes = Transform::kMaps * kMapBytes;

  const T* maps[Transform::kMaps];  // [pixels, filters]; a null one is all zeros
  Transform transform;
  int filters, first_filter;
  uint32_t total, ahead, now;  // pixels; the first of the step that is copied next, and read next
  Copies copies;
  float vectors[Tile::kRowTiles][2][Transform::kVectors + 1] = {};  // of the rows row_of(i, below)

  FASTRES_DEVICE void begin() {
    if constexpr (Transform::kVectors > 0) {
#pragma unroll
      for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
        const int k = first_filter + Tile::row_of(i / 2, i % 2);
#pragma unroll
        for (int n = 0; n < Transform::kVectors; ++n) {
          const float* const vector = transform.vectors[n];
          vectors[i / 2][i % 2][n] = vector != nullptr && k < filters ? vector[k] : 0.0f;
        }
      }
    }
  }

  FASTRES_DEVICE void load(unsigned char* stage) {
    const int k = first_filter + copies.column;
#pragma unroll
    for (int m = 0; m < Transform::kMaps; ++m) {
      const bool exists = k < filters && maps[m] != nullptr;
      copies.copy(stage + m * kMapBytes, [&](int pixel, bool* valid) {
        *valid = exists && ahead + pixel < total;
        return maps[m] + (*valid ? static_cast<int64_t>(ahead + pixel) * filters + k : 0);
      });
    }
    ahead += kStep<T>;
  }

  FASTRES_DEVICE void fragments(const unsigned char* stage, int half, uint32_t (&a)[Tile::kRowTiles][4]) const {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) left_columns<Tile>(stage, half, i, a[i]);
    if constexpr (Transform::kVectors > 0) transform_registers(stage, half, a);
  }
  FASTRES_DEVICE void next() { now += kStep<T>; }

 private:
  FASTRES_DEVICE void transform_registers(const unsigned char* stage, int half, uint32_t (&a)[Tile::kRowTiles][4]) const {
    constexpr int per = kPerRegister<T>;
    constexpr uint32_t ones = static_cast<Bits<T>>(~0u);
    uint32_t live[2];  // bits of the registers' elements whose pixels exist
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t pixel = now + pixel_of<Tile>(half, side);
      live[side] = pixel < total ? ones : 0u;
      if constexpr (per == 2) live[side] |= pixel + 1 < total ? ones << 16 : 0u;
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      uint32_t second[4] = {};
      if constexpr (Transform::kMaps > 1) left_columns<Tile>(stage + kMapBytes, half, i, second);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float x[per], y[per];
        unpack<T>(a[i][e], x);
        unpack<T>(second[e], y);
#pragma unroll
        for (int k = 0; k < per; ++k) {
          float v[Transform::kVectors];
#pragma unroll
          for (int n = 0; n < Transform::kVectors; ++n) v[n] = vectors[i][e % 2][n];
          x[k] = transform(x[k], y[k], v);
        }
        a[i][e] = pack<T>(x) & live[e / 2];  // zero after the transform: grad_mean gives every pixel of the map a share, and no other
      }
    }
  }
};

// ---- The right operand: inputs, columns of channels -----------------------------------------------------------------------------------
// How output pixels lie: pixel = (image*out_height + p)*out_width + q reads the input at (p, q)*stride + origin.
struct Lattice {
  Divisor by_width, by_height;
  int width, height, stride_h, stride_w, origin_h, origin_w;
};

// The pixels of a step: where they read, and for copies of one tap the elements' bits, all ones where it lies in the map.
template <class T>
struct Table {
  Row rows[kStep<T>];
  alignas(16) Bits<T> seen[kStep<T>];
};

// Stage: [pixels of a step][pitch]. Flat: columns run over taps and channels together, in units; else over the channels of one tap.
template <class Tile, class Transform, bool Flat>
struct Inputs {
  using T = typename Tile::T;
  using Copies = Share<T, Tile::kThreads, Tile::kColumns, Flat>;
  static constexpr int kStageBytes = kStep<T> * Copies::kPitch;
  static constexpr int kTables = Tile::kStages + 1;  // live from the step before that of the copies to that of the products

  const T* x;  // [images, h, w, channels]
  Window map;  // not Flat: one tap
  Lattice lattice;
  Transform transform;
  int first_column;  // of channels, or Flat of taps and channels
  uint32_t total;
  uint32_t unlisted;  // the first pixel of the step whose table is written next
  Copies copies;
  Table<T>* tables;    // [kTables], shared
  int64_t offset = 0;  // of this thread's copies, from a pixel's first element
  int tap_h = 0, tap_w = 0;
  bool exists = false;
  int listed = 0, ahead = 0, now = 0;                               // tables: written, copied from and read next
  float vectors[Tile::kColumnTiles][Transform::kVectors + 1] = {};  // of this lane's columns
  uint32_t taps[Tile::kColumnTiles] = {};                           // Flat: h and w << 16 of its columns

  FASTRES_DEVICE static void advance(int* table) { *table = *table + 1 == kTables ? 0 : *table + 1; }

  // Ends with a barrier: the tables of all steps that are copied before the first barrier of the main loop.
  FASTRES_DEVICE void begin() {
    const int length = map.taps_h * map.taps_w * map.channels, column = first_column + copies.column;
    exists = column < length;
    if constexpr (Flat) {
      const Place p(map, exists ? column : 0);
      tap_h = p.r, tap_w = p.s;
      offset = (static_cast<int64_t>(p.r) * map.h.step * map.w.size + p.s * map.w.step) * map.channels + p.c;
    } else {
      offset = column;
    }
    if constexpr (Transform::kVectors > 0) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const int mine = first_column + Tile::first_column() + j * 8 + Tile::lane() / 4;
        const Place p(map, mine < length ? mine : 0);
        taps[j] = static_cast<uint32_t>(p.r | p.s << 16);
#pragma unroll
        for (int n = 0; n < Transform::kVectors; ++n) vectors[j][n] = mine < length ? transform.vectors[n][p.c] : 0.0f;
      }
    }
    for (int step = 0; step < Tile::kStages - 1; ++step) list();
    __syncthreads();
  }

  FASTRES_DEVICE void load(unsigned char* stage) {
    const Row* const rows = tables[ahead].rows;
    copies.copy(stage, [&](int pixel, bool* valid) {
      const Row found = rows[pixel];
      *valid = exists && found.has(tap_h, tap_w);
      return x + (*valid ? found.offset + offset : 0);
    });
    advance(&ahead);
    if (listed == ahead) list();  // the next step's; not before the main loop's first barrier is next
  }

  FASTRES_DEVICE void fragments(const unsigned char* stage, int half, uint32_t (&b)[Tile::kColumnTiles][2]) const {
    right_columns<Tile>(stage, half, b);
    if constexpr (Transform::kVectors > 0) {
#pragma unroll
      for (int side = 0; side < 2; ++side) transform_registers(pixel_of<Tile>(half, side), side, b);
    }
  }
  FASTRES_DEVICE void next() { advance(&now); }

 private:
  // One warp writes a table: the others' threads need the same pixels for other channels.
  FASTRES_DEVICE void list() {
    if (Tile::warp() == 0 && Tile::lane() < kStep<T>) {
      const uint32_t pixel = unlisted + Tile::lane();
      Row found = {0, 0, 0};
      if (pixel < total) {
        const uint32_t line = divide(pixel, lattice.by_width), image = divide(line, lattice.by_height);
        const int h = static_cast<int>(line - image * lattice.height) * lattice.stride_h + lattice.origin_h;
        const int w = static_cast<int>(pixel - line * lattice.width) * lattice.stride_w + lattice.origin_w;
        found = row_at(map, image, h, w);
      }
      tables[listed].rows[Tile::lane()] = found;
      if constexpr (Transform::kVectors > 0 && !Flat) tables[listed].seen[Tile::lane()] = static_cast<Bits<T>>(found.has(0, 0) ? ~0u : 0u);
    }
    unlisted += kStep<T>;
    advance(&listed);
  }

  // Padding, pixels past the end among it, is zero after the transform.
  FASTRES_DEVICE void transform_registers(int pixel, int side, uint32_t (&b)[Tile::kColumnTiles][2]) const {
    constexpr int per = kPerRegister<T>;
    uint32_t seen = 0, inside_h[per], inside_w[per];
    if constexpr (Flat) {
#pragma unroll
      for (int k = 0; k < per; ++k) {
        inside_h[k] = tables[now].rows[pixel + k].inside_h;
        inside_w[k] = tables[now].rows[pixel + k].inside_w;
      }
    } else {
      seen = *reinterpret_cast<const uint32_t*>(tables[now].seen + pixel);
    }
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      float x[per], v[Transform::kVectors];
#pragma unroll
      for (int n = 0; n < Transform::kVectors; ++n) v[n] = vectors[j][n];
      unpack<T>(b[j][side], x);
#pragma unroll
      for (int k = 0; k < per; ++k) {
        x[k] = transform(x[k], 0.0f, v);
        if constexpr (Flat) {
          if ((inside_h[k] >> (taps[j] & 0xffffu) & inside_w[k] >> (taps[j] >> 16) & 1u) == 0) x[k] = 0.0f;
        }
      }
      b[j][side] = pack<T>(x);
      if constexpr (!Flat) b[j][side] &= seen;
    }
  }
};

}  // namespace fastres::cuda
