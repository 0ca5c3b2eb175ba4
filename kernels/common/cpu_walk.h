// The one traversal that every elementwise and reducing CPU kernel uses.
//
// A block is `rows` rows of K vectors, `stride` elements apart. In channels_last a row is a position and the vectors are channels; in a
// contiguous plane a "row" is simply the next K vectors and all lanes are the same channel. So one body serves both layouts: only
// the per-channel vectors are loaded (channels_last) or broadcast (contiguous), and sums are per lane or over all lanes.
#pragma once

#include "cpu_shape.h"
#include "cpu_vec.h"

namespace fastres::FASTRES_ISA {

struct Block {
  int64_t offset;   // of the first element, from the start of the tensor
  int64_t stride;   // elements from one row to the next
  int64_t rows;     // how many
  int64_t channel;  // channel of the first lane (of every lane in a contiguous plane)
  int64_t lanes;    // elements of the last vector that exist, where the block is Partial
};

// Vectors that a block holds in registers at once.
constexpr int kBlockVectors = 4;
// A tile of rows is walked block by block, so it should stay in the first-level cache for all the streams of a kernel.
constexpr int64_t kTileElements = 2048;

// A per-channel vector [C], at the lanes of a block's K vectors of T.
template <class T, bool Planes, bool Partial, int K>
FASTRES_INLINE void channel_load(const float* p, const Block& b, Vec (&out)[K]) {
  if constexpr (Planes) {
    for (int k = 0; k < K; ++k) out[k] = splat<Vec>(p[b.channel]);
  } else {
    load_floats<T, Partial>(p + b.channel, b.lanes, out);
  }
}

// Calls body.template block<K, Partial>(Block) so that every element of the item is in exactly one block.
template <bool Planes, class Body>
FASTRES_INLINE void walk(const Shape& s, int64_t item, Body& body) {
  constexpr int64_t kWide = kBlockVectors * kWidth;
  if constexpr (Planes) {
    const int64_t part = item / s.channels, channel = item % s.channels;
    const int64_t image = part / pieces_of(s), start = part % pieces_of(s) * kPieceElements;
    const int64_t n = positions_of_part(s, part);
    const int64_t base = (image * s.channels + channel) * plane_of(s) + start;
    const int64_t wide = n / kWide * kWide, whole = n / kWidth * kWidth;
    if (wide > 0) body.template block<kBlockVectors, false>({base, kWide, wide / kWide, channel, 0});
    if (whole > wide) body.template block<1, false>({base + wide, kWidth, (whole - wide) / kWidth, channel, 0});
    if (n > whole) body.template block<1, true>({base + whole, kWidth, 1, channel, n - whole});
  } else {
    const int64_t C = s.channels, wide = C / kWide * kWide, whole = C / kWidth * kWidth;
    const int64_t first = item * rows_per_part(s), n = positions_of_part(s, item);
    const int64_t tile = min64(64, max64(4, kTileElements / C));
    for (int64_t done = 0; done < n; done += tile) {
      const int64_t rows = min64(tile, n - done), base = (first + done) * C;
      for (int64_t c = 0; c < wide; c += kWide) body.template block<kBlockVectors, false>({base + c, C, rows, c, 0});
      for (int64_t c = wide; c < whole; c += kWidth) body.template block<1, false>({base + c, C, rows, c, 0});
      if (C > whole) body.template block<1, true>({base + whole, C, rows, whole, C - whole});
    }
  }
}

// Partial sums of one part: `Count` rows of C floats, [Count, C].
// channels_last: the rows themselves are the running sums. Contiguous: the lanes of each block are added up in double.
template <class T, bool Planes, int Count>
struct Sums {
  float* out;           // [Count, C], of this part
  int64_t channels;     // C
  double total[Count];  // contiguous only: the running sum of this item's channel

  FASTRES_INLINE Sums begin(float* out, int64_t channels) {
    Sums s{out, channels, {}};
    if constexpr (!Planes) {
      for (int64_t i = 0; i < Count * channels; ++i) out[i] = 0.0f;
    }
    return s;
  }

  template <int K, bool Partial>
  __attribute__((always_inline)) void open(const Block& b, Vec (&acc)[Count][K]) const {
    for (int i = 0; i < Count; ++i) {
      if constexpr (Planes) {
        for (int k = 0; k < K; ++k) acc[i][k] = Vec{};
      } else {
        load_floats<T, Partial>(out + i * channels + b.channel, b.lanes, acc[i]);
      }
    }
  }

  template <int K, bool Partial>
  __attribute__((always_inline)) void close(const Block& b, const Vec (&acc)[Count][K]) {
    for (int i = 0; i < Count; ++i) {
      if constexpr (Planes) {
        for (int k = 0; k < K; ++k) total[i] += sum(acc[i][k]);
      } else {
        store_floats<T, Partial>(out + i * channels + b.channel, acc[i], b.lanes);
      }
    }
  }

  __attribute__((always_inline)) void end(int64_t channel) const {
    if constexpr (Planes) {
      for (int i = 0; i < Count; ++i) out[i * channels + channel] = static_cast<float>(total[i]);
    }
  }
};

// Channels that a merge over parts keeps in registers or the first-level cache; its inner loops run over them and vectorise.
constexpr int64_t kMergeChannels = 64;

// Adds the parts up in double: out[c], for the channels [begin, end), of row `row` of partial [parts, rows, C].
static inline void sum_parts(const float* partial, int64_t parts, int64_t rows, int64_t row, int64_t channels, int64_t begin, int64_t end,
                             float* out) {
  for (int64_t first = begin; first < end; first += kMergeChannels) {
    const int64_t n = min64(kMergeChannels, end - first);
    double total[kMergeChannels] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const float* from = partial + (part * rows + row) * channels + first;
      for (int64_t i = 0; i < n; ++i) total[i] += from[i];
    }
    for (int64_t i = 0; i < n; ++i) out[first + i] = static_cast<float>(total[i]);
  }
}

}  // namespace fastres::FASTRES_ISA
