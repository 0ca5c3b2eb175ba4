// Operands of the weight gradient, whose rows and columns are filters and channels: the reduction runs over output pixels.
//
// Both are transformed in shared memory. A thread changes what it has copied itself, which it sees before anybody else does, so that this
// needs no barrier of its own, and an element is transformed once: in the registers of the tensor cores' operands it would be once for each
// warp that reads it, which is four times as many instructions as the products take. A thread's copies all have the same channels, and it
// keeps those channels' vectors in registers.
#pragma once

#include "../conv/cuda_gather.cuh"
#include "cuda_weight_shape.h"

namespace fastres::cuda {

// n < 2^31
FASTRES_DEVICE uint32_t divide(uint32_t n, Divisor by) {
  return (static_cast<uint32_t>(static_cast<uint64_t>(by.multiplier) * n >> 32) + n) >> by.shift;
}

// A transform's vectors for neighbouring channels.
template <class T, class Transform>
struct Vectors {
  float of[kChunk<T>][Transform::kVectors > 0 ? Transform::kVectors : 1];
};

// How a block's threads share the copies of a step, shared [pixels][kPitch bytes]: a thread copies columns [column, column + unit) of
// pixels first, first + down, ... Narrow: copies of `unit` elements, known at run time; else of 16 bytes.
template <class T, int Threads, int Width, bool Narrow>
struct Share {
  static constexpr int kPitch = kColumnPitch<T, Width>, kBytes = kStep<T> * kPitch;
  static constexpr int kDown = Threads * kChunk<T> / Width;  // of 16-byte copies
  static_assert(kStep<T> % kDown == 0);
  int unit, column, first, down;

  FASTRES_DEVICE explicit Share(int narrow_unit) : unit(Narrow ? narrow_unit : kChunk<T>) {
    const int pieces = Width / unit, thread = static_cast<int>(threadIdx.x);
    column = thread % pieces * unit, first = thread / pieces, down = Threads / pieces;
  }
  FASTRES_DEVICE bool whole() const { return !Narrow || unit == kChunk<T>; }
  FASTRES_DEVICE unsigned char* own(unsigned char* shared, int pixel) const {
    return shared + pixel * kPitch + column * static_cast<int>(sizeof(T));
  }

  // source(pixel, &valid): where the columns' neighbours lie; not valid: zeros.
  template <class Source>
  FASTRES_DEVICE void copy(unsigned char* shared, Source source) const {
    bool valid;
    if (whole()) {
#pragma unroll
      for (int i = 0; i < kStep<T> / kDown; ++i) {
        const int pixel = first + i * kDown;
        const T* const from = source(pixel, &valid);
        copy_async<16>(own(shared, pixel), from, valid);
      }
    } else {
      for (int pixel = first; pixel < kStep<T>; pixel += down) {
        const T* const from = source(pixel, &valid);
        copy_unit(own(shared, pixel), from, valid, unit);
      }
    }
  }

  // Transforms the copies that have landed, of Transform's one or two maps behind each other, into the first. Where not seen(pixel) they
  // stay zero. vectors: of the thread's columns.
  template <class Transform, class Seen>
  FASTRES_DEVICE void change(unsigned char* shared, const Transform& transform, const Vectors<T, Transform>& vectors, Seen seen) const {
    constexpr int per = kPerRegister<T>;
    constexpr bool two = Transform::kMaps > 1;
    if (whole()) {
#pragma unroll
      for (int i = 0; i < kStep<T> / kDown; ++i) {
        const int pixel = first + i * kDown;
        using Registers = Pack<uint32_t, 4>;
        Registers* const place = reinterpret_cast<Registers*>(own(shared, pixel));
        Registers a = *place, b = {};
        if constexpr (two) b = *reinterpret_cast<const Registers*>(own(shared + kBytes, pixel));
        const uint32_t live = seen(pixel) ? ~0u : 0u;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float x[per], y[per];
          unpack<T>(a.x[r], x);
          unpack<T>(b.x[r], y);
#pragma unroll
          for (int k = 0; k < per; ++k) x[k] = transform(x[k], y[k], vectors.of[r * per + k]);
          a.x[r] = pack<T>(x) & live;
        }
        *place = a;
      }
    } else {
      for (int pixel = first; pixel < kStep<T>; pixel += down) {
        if (!seen(pixel)) continue;
        T* const place = reinterpret_cast<T*>(own(shared, pixel));
        const T* const other = reinterpret_cast<const T*>(own(shared + (two ? kBytes : 0), pixel));
#pragma unroll
        for (int k = 0; k < kChunk<T> / 2; ++k) {
          if (k < unit) from_float(transform(to_float(place[k]), to_float(other[k]), vectors.of[k]), place + k);
        }
      }
    }
  }
};

// ---- The left operand: G, columns of filters ------------------------------------------------------------------------------------------
// Stage: maps [kMaps][pixels of a step][pitch].
template <class Tile, class Transform, bool Narrow>
struct Gradients {
  using T = typename Tile::T;
  using Copies = Share<T, Tile::kThreads, Tile::kRows, Narrow>;
  static constexpr int kStageBytes = Transform::kMaps * Copies::kBytes;

  const T* maps[Transform::kMaps];  // [pixels, filters]; a null one is all zeros
  Transform transform;
  int filters, first_filter;
  uint32_t total, ahead, now;  // pixels: all, and the first of the step that is copied next, and read next
  Copies copies;
  Vectors<T, Transform> vectors = {};

  FASTRES_DEVICE void begin() {
    if constexpr (Transform::kVectors > 0) {
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const int k = first_filter + copies.column + e;
#pragma unroll
        for (int n = 0; n < Transform::kVectors; ++n) {
          const float* const vector = transform.vectors[n];
          vectors.of[e][n] = vector != nullptr && k < filters ? vector[k] : 0.0f;
        }
      }
    }
  }

  FASTRES_DEVICE void load(unsigned char* stage) {
    const int k = first_filter + copies.column;
#pragma unroll
    for (int m = 0; m < Transform::kMaps; ++m) {
      const bool exists = k < filters && maps[m] != nullptr;
      copies.copy(stage + m * Copies::kBytes, [&](int pixel, bool* valid) {
        *valid = exists && ahead + pixel < total;
        return maps[m] + (*valid ? static_cast<int64_t>(ahead + pixel) * filters + k : 0);
      });
    }
    ahead += kStep<T>;
  }

  // Zero past the end: grad_mean gives every pixel of the map a share, and no other.
  FASTRES_DEVICE void arrived(unsigned char* stage) const {
    if constexpr (Transform::kVectors > 0) copies.change(stage, transform, vectors, [&](int pixel) { return now + pixel < total; });
  }
  FASTRES_DEVICE void fragments(const unsigned char* stage, int half, uint32_t (&a)[Tile::kRowTiles][4]) const {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) left_columns<Tile>(stage, half, i, a[i]);
  }
  FASTRES_DEVICE void next() { now += kStep<T>; }
};

// ---- The right operand: inputs, columns of channels -----------------------------------------------------------------------------------
// How output pixels lie: pixel = (image*height + p)*width + q reads the input at (p, q)*stride + origin.
struct Lattice {
  Divisor by_width, by_height;
  int width, height, stride_h, stride_w, origin_h, origin_w;
};

// Stage: [pixels of a step][pitch]. Flat: columns run over taps and channels together, in units; else over the channels of one tap.
template <class Tile, class Transform, bool Flat>
struct Inputs {
  using T = typename Tile::T;
  using Copies = Share<T, Tile::kThreads, Tile::kColumns, Flat>;
  static constexpr int kStageBytes = Copies::kBytes;
  static constexpr int kTables = Tile::kStages;  // one is needed from the step before its copies are issued until they have arrived

  const T* x;  // [images, h, w, channels]
  Window map;  // not Flat: one tap
  Lattice lattice;
  Transform transform;
  int first_column;  // of channels, or Flat of taps and channels
  uint32_t total;
  uint32_t unlisted;  // the first pixel of the step whose table is written next
  Copies copies;
  Row* tables;         // [kTables][pixels of a step], shared: where a step's pixels read
  int64_t offset = 0;  // of this thread's copies, from a pixel's first element
  int tap_h = 0, tap_w = 0;
  bool exists = false;
  int listed = 0, ahead = 0, now = 0;  // tables: written, copied from and read next
  Vectors<T, Transform> vectors = {};

  FASTRES_DEVICE static void advance(int* table) { *table = *table + 1 == kTables ? 0 : *table + 1; }

  // Writes the tables of all steps that are copied before the first barrier of the main loop, and ends with a barrier.
  FASTRES_DEVICE void begin() {
    const int length = map.taps_h * map.taps_w * map.channels, column = first_column + copies.column;
    exists = column < length;
    const Place p(map, exists ? column : 0);
    tap_h = p.r, tap_w = p.s;
    offset = (static_cast<int64_t>(p.r) * map.h.step * map.w.size + p.s * map.w.step) * map.channels + p.c;
    if constexpr (Transform::kVectors > 0) {
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
#pragma unroll
        for (int n = 0; n < Transform::kVectors; ++n) vectors.of[e][n] = exists && e < copies.unit ? transform.vectors[n][p.c + e] : 0.0f;
      }
    }
    for (int step = 0; step < Tile::kStages - 1; ++step) list();
    __syncthreads();
  }

  FASTRES_DEVICE void load(unsigned char* stage) {
    const Row* const rows = tables + ahead * kStep<T>;
    copies.copy(stage, [&](int pixel, bool* valid) {
      const Row found = rows[pixel];
      *valid = exists && found.has(tap_h, tap_w);
      return x + (*valid ? found.offset + offset : 0);
    });
    advance(&ahead);
    if (listed == ahead) list();  // of the next step, which is copied after the main loop's next barrier
  }

  // Padding, pixels past the end among it, is zero after the transform.
  FASTRES_DEVICE void arrived(unsigned char* stage) const {
    if constexpr (Transform::kVectors > 0) {
      const Row* const rows = tables + now * kStep<T>;
      copies.change(stage, transform, vectors, [&](int pixel) { return rows[pixel].has(tap_h, tap_w); });
    }
  }
  FASTRES_DEVICE void fragments(const unsigned char* stage, int half, uint32_t (&b)[Tile::kColumnTiles][2]) const {
    right_columns<Tile>(stage, half, b);
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
      tables[listed * kStep<T> + Tile::lane()] = found;
    }
    unlisted += kStep<T>;
    advance(&listed);
  }
};

}  // namespace fastres::cuda
