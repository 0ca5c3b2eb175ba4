// Operands of the convolutions whose rows are pixels: gathered from a map tap by tap, transformed on their way to the tensor cores.
#pragma once

#include "cuda_tile.cuh"

namespace fastres::cuda {

// Where the pixels that a row reads lie, on one axis: first + tap*step, inside [0, size).
struct Axis {
  int step, size;
  FASTRES_DEVICE uint32_t inside(int first, int taps) const {  // bit t: tap t lies in the map
    uint32_t bits = 0;
    for (int t = 0; t < taps; ++t)
      bits |= static_cast<uint32_t>(static_cast<unsigned>(first + t * step) < static_cast<unsigned>(size)) << t;
    return bits;
  }
};

// The map that rows are gathered from, and the taps: map [images, h.size, w.size, channels].
struct Window {
  Axis h, w;
  int taps_h, taps_w, channels;
};

// One row of the tile: which element its tap (0, 0) begins at (may lie outside the map), and which taps lie inside.
struct alignas(16) Row {
  int64_t offset;
  uint32_t inside_h, inside_w;
  FASTRES_DEVICE bool has(int r, int s) const { return (inside_h >> r & inside_w >> s & 1u) != 0; }
};
FASTRES_DEVICE Row row_at(const Window& map, int64_t image, int h, int w) {
  return {((image * map.h.size + h) * map.w.size + w) * map.channels, map.h.inside(h, map.taps_h), map.w.inside(w, map.taps_w)};
}

// The reduction axis of taps and channels. Flat: one axis of taps*channels elements, as weights lie in memory; else a step lies within one
// tap, and the last step of a tap is filled up with zeros.
template <class T, bool Flat>
struct Walk {
  int c = 0, r = 0, s = 0;  // where a step begins; Flat: c is the position on the one axis
  FASTRES_DEVICE void next(const Window& map) {
    c += kStep<T>;
    if constexpr (!Flat) {
      if (c >= map.channels) {
        c = 0;
        if (++s == map.taps_w) s = 0, ++r;
      }
    }
  }
  FASTRES_DEVICE static int steps(const Window& map) {
    const int taps = map.taps_h * map.taps_w;
    return Flat ? (taps * map.channels + kStep<T> - 1) / kStep<T> : taps * ((map.channels + kStep<T> - 1) / kStep<T>);
  }
};

// A place on the flat axis.
struct Place {
  int r, s, c;
  FASTRES_DEVICE Place(const Window& map, int position) {
    const int tap = position / map.channels;
    c = position - tap * map.channels;
    r = tap / map.taps_w;
    s = tap - r * map.taps_w;
  }
};

// One element from global to shared memory.
template <class T>
FASTRES_DEVICE void copy_element(void* shared, const T* global, bool valid) {
  if constexpr (sizeof(T) == 4) {
    copy_async<4>(shared, global, valid);
  } else {
    *static_cast<T*>(shared) = valid ? *global : T{0};
  }
}
// `unit` (elements that are aligned together) neighbours.
template <class T>
FASTRES_DEVICE void copy_unit(unsigned char* shared, const T* global, bool valid, int unit) {
  const int bytes = unit * static_cast<int>(sizeof(T));
  if (bytes == 8) {
    copy_async<8>(shared, global, valid);
  } else if (bytes == 4) {
    copy_async<4>(shared, global, valid);
  } else {
    copy_element(shared, global, valid);
  }
}

// ---- Transforms: what becomes of an element on its way to the tensor cores; v: its channel's entries of the vectors -------------------
struct Raw {
  static constexpr int kMaps = 1, kVectors = 0;
  static constexpr bool kKeepsZero = true;  // padding stays zero by itself
};

// act(scale*(x - center) + shift); vectors: scale, center, shift.
struct Activation {
  static constexpr int kMaps = 1, kVectors = 3;
  static constexpr bool kKeepsZero = false;
  const float* vectors[3];
  float least;  // 0 for a ReLU, else minus infinity
  FASTRES_DEVICE float operator()(float x, float, const float (&v)[3]) const { return larger(fmaf(v[0], x - v[1], v[2]), least); }
};

// G = factor*grad_y + grad_mean/n + 2*grad_var/n*(y - mean); vectors: factor, grad_mean, grad_var, mean, of which null ones count as 0
// (a factor as 1). WithY: the second map is y, else the last term is left out.
template <bool WithY>
struct Combined {
  static constexpr int kMaps = WithY ? 2 : 1, kVectors = WithY ? 4 : 2;
  static constexpr bool kKeepsZero = false;
  const float* vectors[kVectors];
  float inverse_count;  // 1/n
  FASTRES_DEVICE float operator()(float grad, float y, const float (&v)[kVectors]) const {
    const float factor = vectors[0] != nullptr ? v[0] : 1.0f;
    float g = fmaf(factor, grad, v[1] * inverse_count);
    if constexpr (WithY) g = fmaf(v[2] * (2.0f * inverse_count), y - v[3], g);
    return g;
  }
};

// ---- The left operand: rows of pixels -------------------------------------------------------------------------------------------------
// Stage: maps [kMaps][rows][kPitch bytes], then vectors [kVectors][elements of a step] float.
// Wide (not Flat): channels and pointers allow 16-byte copies. Pointwise: row m of the product is row m of the map, the only tap.
template <class Tile, class Transform, bool Flat, bool Pointwise>
struct Gather {
  using T = typename Tile::T;
  static constexpr int kOwn = Tile::kRows * 4 / Tile::kThreads;
  static constexpr int kMapBytes = Tile::kRows * kPitch;
  static constexpr int kStageBytes = Transform::kMaps * kMapBytes + Transform::kVectors * kStep<T> * 4;

  const T* maps[Transform::kMaps];  // [images, h, w, channels]; a null one is all zeros
  Window map;
  Transform transform;
  const Row* rows;  // [kRows], shared
  int unit;         // Flat: elements that are aligned together, up to 8 bytes
  Walk<T, Flat> ahead = {}, now = {};
  Row own[kOwn] = {};  // the rows that this thread copies; read by begin()
  uint32_t live = 0;   // bit 2i + below: the row row_of(i, below) of this warp has the present tap

  FASTRES_DEVICE static int own_row(int i) { return static_cast<int>(threadIdx.x) / 4 + i * (Tile::kThreads / 4); }
  // Once, when `rows` is filled and visible.
  FASTRES_DEVICE void begin() {
    if constexpr (!Flat) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) own[i] = rows[own_row(i)];
    }
  }

  FASTRES_DEVICE void load(unsigned char* stage) {
    if constexpr (Flat) {
      load_flat(stage);
    } else {
      const int chunk = static_cast<int>(threadIdx.x) % 4, c = ahead.c + chunk * kChunk<T>;
      const bool exists = c < map.channels;
      const int64_t tap =
          Pointwise ? c : (static_cast<int64_t>(ahead.r) * map.h.step * map.w.size + ahead.s * map.w.step) * map.channels + c;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const bool valid = exists && own[i].has(ahead.r, ahead.s);
        const int64_t at = valid ? own[i].offset + tap : 0;
#pragma unroll
        for (int m = 0; m < Transform::kMaps; ++m) {
          const bool given = m > 0 || maps[0] != nullptr;
          copy_async<16>(stage + m * kMapBytes + own_row(i) * kPitch + chunk * 16, maps[m] + (given ? at : 0), valid && given);
        }
      }
    }
    load_vectors(reinterpret_cast<float*>(stage + Transform::kMaps * kMapBytes));
    ahead.next(map);
  }

  FASTRES_DEVICE void load_flat(unsigned char* stage) {
    const int chunks = kStep<T> / unit, down = Tile::kThreads / chunks;
    const int chunk = static_cast<int>(threadIdx.x) % chunks, position = ahead.c + chunk * unit;
    const bool exists = position < map.taps_h * map.taps_w * map.channels;
    const Place p(map, exists ? position : 0);
    const int64_t tap = (static_cast<int64_t>(p.r) * map.h.step * map.w.size + p.s * map.w.step) * map.channels + p.c;
    for (int row = static_cast<int>(threadIdx.x) / chunks; row < Tile::kRows; row += down) {
      const Row found = rows[row];
      const bool valid = exists && found.has(p.r, p.s);
      for (int m = 0; m < Transform::kMaps; ++m) {
        const bool given = m > 0 || maps[0] != nullptr;
        const T* const source = maps[m] + (valid && given ? found.offset + tap : 0);
        copy_unit(stage + m * kMapBytes + row * kPitch + chunk * unit * static_cast<int>(sizeof(T)), source, valid && given, unit);
      }
    }
  }

  // Vectors may begin anywhere: 4 bytes a copy. Channels past the end, and vectors that are not given, are zero.
  FASTRES_DEVICE void load_vectors(float* shared) {
    static_assert(Transform::kVectors * kStep<T> <= Tile::kThreads);
    if constexpr (Transform::kVectors > 0) {
      const float* const* const vectors = transform.vectors;
#pragma unroll
      for (int v = 0; v < Transform::kVectors; ++v) {  // kStep threads a vector
        const int i = static_cast<int>(threadIdx.x) - v * kStep<T>, position = ahead.c + i;
        if (i < 0 || i >= kStep<T>) continue;
        const bool valid = vectors[v] != nullptr && position < (Flat ? map.taps_h * map.taps_w : 1) * map.channels;
        copy_async<4>(shared + v * kStep<T> + i, vectors[v] + (valid ? (Flat ? position % map.channels : position) : 0), valid);
      }
    }
  }

  FASTRES_DEVICE void fragments(const unsigned char* stage, int half, uint32_t (&a)[Tile::kRowTiles][4]) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) left_rows<Tile>(stage, half, i, a[i]);
    if constexpr (Transform::kVectors > 0) transform_registers(stage, half, a);
  }
  FASTRES_DEVICE void next() { now.next(map); }

 private:
  static constexpr int kPer = kPerRegister<T>, kSide = kStep<T> / 4;  // kSide: elements between a[0] and a[2]

  FASTRES_DEVICE void transform_registers(const unsigned char* stage, int half, uint32_t (&a)[Tile::kRowTiles][4]) {
    const float* const vectors = reinterpret_cast<const float*>(stage + Transform::kMaps * kMapBytes);
    const int first = half * (kStep<T> / 2) + Tile::lane() % 4 * kPer;
    float v[2][kPer][Transform::kVectors];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
#pragma unroll
        for (int n = 0; n < Transform::kVectors; ++n) v[side][e][n] = vectors[n * kStep<T> + first + side * kSide + e];
      }
    }
    if constexpr (!Flat && !Pointwise) {
      if (half == 0 && now.c == 0) look();  // a new tap
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      uint32_t second[4] = {};
      if constexpr (Transform::kMaps > 1) left_rows<Tile>(stage + kMapBytes, half, i, second);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float x[kPer], y[kPer];
        unpack<T>(a[i][e], x);
        unpack<T>(second[e], y);
#pragma unroll
        for (int k = 0; k < kPer; ++k) {
          x[k] = transform(x[k], y[k], v[e / 2][k]);
          if (Flat && !visible(i, e % 2, now.c + first + e / 2 * kSide + k)) x[k] = 0.0f;
        }
        a[i][e] = pack<T>(x);
        if (!Flat && !visible(i, e % 2, 0)) a[i][e] = 0;  // padding is zero after the transform
      }
    }
  }

  // Rows past the end of a plain product are junk that nobody reads.
  FASTRES_DEVICE bool visible(int i, int below, int position) const {
    if constexpr (Flat) {
      if (position >= map.taps_h * map.taps_w * map.channels) return false;
      const Place p(map, position);
      return rows[Tile::row_of(i, below)].has(p.r, p.s);
    } else {
      return Pointwise || (live >> (2 * i + below) & 1u) != 0;
    }
  }
  FASTRES_DEVICE void look() {
    live = 0;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
      live |= static_cast<uint32_t>(rows[Tile::row_of(i / 2, i % 2)].has(now.r, now.s)) << i;
    }
  }
};

}  // namespace fastres::cuda
