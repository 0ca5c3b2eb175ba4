// Direct convolution with vector multiply-adds, on every instruction set.
//
// Computes y = epilogue(sum over taps and channels of panel * w) for one band of output rows and one range of channel blocks a task. A
// block of 2 vectors of output channels times a tile of up to kTile positions stays in registers; for each element of K, two vectors of
// weights are loaded and every position's element is broadcast. Reads x once into the panel (which stays in the second cache), the band's
// share of the residual once, the weights once a band; writes y once.
//
// Weights [K/block][R*S][run][block] (float), or [K/block][R*S][run/2][block][2] (bf16 pairs, where the CPU multiplies them).
#pragma once

#include "cpu_epilogue.h"
#include "cpu_product.h"

namespace fastres::FASTRES_ISA {

template <bool Pairs>
PanelFormat direct_format(bool bfloat16) {
  // 256 KB of panel leave room for a block's weights in a second cache of 512 KB or more.
  return {Pairs ? 2 : 4, 1, Product<Pairs>::kDepth, 15, !Pairs, 256 << 10, kDirectTile, false, kDirectBlock, Pairs == bfloat16, {0, 0}};
}

// All of K in chains of at most kChain products, because the error of a chain of float sums grows with its length.
template <bool Pairs>
FASTRES_INLINE void direct_chains(int count, const char* a, int64_t stride, const int64_t* offsets, int64_t runs, int64_t words,
                                  const float* u, float* acc) {
  constexpr int64_t kChain = 512;
  const int64_t runs_at_once = max64(1, kChain / words);
  for (int64_t r = 0; r < runs; r += runs_at_once) {
    for (int64_t k = 0; k < words; k += kChain) {
      product_of<Pairs, false>(count, {a + 4 * k, stride, offsets + r, min64(runs_at_once, runs - r), min64(kChain, words - k),
                                       u + (r * words + k) * kDirectBlock, acc, r + k == 0, nullptr, 0});
    }
  }
}

// A task's scratch, in order: run offsets, tiles, accumulators, sums, panel.
struct DirectScratch {
  int64_t offsets, tiles, acc, sums, panel, bytes;
};

FASTRES_INLINE DirectScratch scratch_of(const Conv& c, const Geometry& g, int64_t acc_floats) {
  DirectScratch s;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  s.offsets = take(g.runs * ceil_div(g.run, 32) * 8);
  s.tiles = take((most_tiles(g) + 1) * static_cast<int64_t>(sizeof(Tile)));
  s.acc = take(acc_floats * 4);
  s.sums = take(sum_rows(c) * g.blocks * g.format.block * 4);
  s.panel = take(panel_bytes(g, g.images, g.rows, g.format.planes) + 256);
  s.bytes = at;
  return s;
}

FASTRES_INLINE PanelWriter writer_of(const Geometry& g, const Band& b, char* at) {
  const int64_t plane = plane_elements(g, b.images, b.rows);
  return {plane, at, false, plane, 0, g.s.in_channels};
}

template <class T, bool Pairs>
void run_direct(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  using P = Product<Pairs>;
  using E = typename P::Panel::Element;
  const Geometry g = geometry_of(c, direct_format<Pairs>(c.bfloat16));
  const DirectScratch at = scratch_of(c, g, kDirectTile * kDirectBlock);
  char* base = static_cast<char*>(scratch);
  int64_t* offsets = reinterpret_cast<int64_t*>(base + at.offsets);
  Tile* tiles = reinterpret_cast<Tile*>(base + at.tiles);
  float* acc = reinterpret_cast<float*>(base + at.acc);
  const Sums sums{reinterpret_cast<float*>(base + at.sums), g.blocks * kDirectBlock};
  const int64_t words = g.run / P::kDepth;
  const int64_t block_floats = g.runs * words * kDirectBlock;
  for (int64_t task = begin; task < end; ++task) {
    const Band b = band_of(g, task);
    PanelWriter w = writer_of(g, b, base + at.panel);
    const char* panel = base + at.panel;
    if (g.in_place) {
      panel = static_cast<const char*>(c.x) + b.row * g.pixel * static_cast<int64_t>(sizeof(E));
    } else {
      pack_panel<typename P::Panel, T>(c, g, b, w);
    }
    for (int64_t r = 0; r < g.runs; ++r) offsets[r] = run_offset(g, b, r) * static_cast<int64_t>(sizeof(E));
    const int64_t count = cut_into_tiles(g, b, tiles);
    __builtin_memset(sums.rows, 0, sum_rows(c) * sums.stride * sizeof(float));
    with_ends(c, [&]<Ends end_kind, bool residual>() {
      for (int64_t block = b.first_block; block < b.last_block; ++block) {
        const float* u = static_cast<const float*>(c.weights) + block * block_floats;
        const int64_t k0 = block * kDirectBlock, channels = min64(kDirectBlock, c.shape.out_channels - k0);
        for (int64_t i = 0; i < count; ++i) {
          const Tile& t = tiles[i];
          direct_chains<Pairs>(t.count, panel + t.v * g.pixel * static_cast<int64_t>(sizeof(E)), g.pixel * static_cast<int64_t>(sizeof(E)),
                               offsets, g.runs, words, u, acc);
          finish_tile<T, end_kind, residual>(c, t, acc, kDirectBlock, k0, channels, sums);
        }
      }
    });
    if (sum_rows(c) > 0) publish_sums(c, sums, task, b.first_block * kDirectBlock, b.last_block * kDirectBlock);
  }
}

// ---- the kernel as the engine sees it -------------------------------------------------------------------------------------------------
FASTRES_INLINE bool pairs_for(bool bfloat16) { return kMultipliesPairs && bfloat16; }

FASTRES_INLINE Geometry direct_geometry(const Conv& c) {
  if constexpr (kMultipliesPairs) {
    if (c.bfloat16) return geometry_of(c, direct_format<kMultipliesPairs>(true));
  }
  return geometry_of(c, direct_format<false>(c.bfloat16));
}

inline const char* direct_refusal(const Conv& c) {
  if (c.shape.groups != 1) return "grouped convolutions";
  if (c.part && is_flat(c.shape)) return "parts of pointwise convolutions";
  return nullptr;
}

// Elements [i, i + n) of run r of a chunk, for output channel k: zeros behind the last.
FASTRES_INLINE void gather_weights(const ConvShape& s, const Geometry& g, const WeightView& weight, int64_t k, int64_t chunk, int64_t run,
                                   int64_t i, int64_t n, float* out) {
  const int64_t taps = s.kernel_h * s.kernel_w, C = s.in_channels;
  const float* from = weight.data + k * weight.out;
  const auto tap_at = [&](int64_t tap) { return (weight.reversed ? taps - 1 - tap : tap) * weight.tap_stride; };
  if (g.columns) {  // i = tap*C + c
    for (int64_t j = 0; j < n; ++j) out[j] = i + j < taps * C ? from[(i + j) % C * weight.in + tap_at((i + j) / C)] : 0.0f;
    return;
  }
  if (g.overlap) {  // run is a row of taps, i = column*C + c
    for (int64_t j = 0; j < n; ++j) {
      out[j] = i + j < s.kernel_w * C ? from[(i + j) % C * weight.in + tap_at(run * s.kernel_w + (i + j) / C)] : 0.0f;
    }
    return;
  }
  const int64_t first = chunk_first(g, chunk) + i, present = max64(0, min64(n, chunk_last(g, chunk) - first));
  from += tap_at(run) + first * weight.in;
  if (weight.in == 1) {
    for (int64_t j = 0; j < present; ++j) out[j] = from[j];
  } else {
    for (int64_t j = 0; j < present; ++j) out[j] = from[j * weight.in];
  }
  for (int64_t j = present; j < n; ++j) out[j] = 0.0f;
}

FASTRES_INLINE Conv packing_problem(const ConvShape& s, bool bfloat16) {
  Conv c{};
  c.shape = s;
  c.bfloat16 = bfloat16;
  c.threads = 1;
  return c;
}

inline int64_t direct_packed_bytes(const ConvShape& s, bool bfloat16) {
  const Geometry g = direct_geometry(packing_problem(s, bfloat16));
  return g.blocks * g.runs * g.run * kDirectBlock * g.format.element;
}

inline int64_t direct_pack_items(const ConvShape& s, bool) { return ceil_div(s.out_channels, kDirectBlock); }

inline void direct_pack(const ConvShape& s, bool bfloat16, const WeightView& weight, void* packed, int64_t begin, int64_t end) {
  const Geometry g = direct_geometry(packing_problem(s, bfloat16));
  const int64_t depth = pairs_for(bfloat16) ? 2 : 1;
  for (int64_t k = begin * kDirectBlock; k < end * kDirectBlock; ++k) {
    for (int64_t r = 0; r < g.runs; ++r) {
      const int64_t to = (k / kDirectBlock * g.runs + r) * g.run * kDirectBlock + k % kDirectBlock * depth;
      for (int64_t i = 0; i < g.run; i += depth) {
        float x[2] = {};
        if (k < s.out_channels) gather_weights(s, g, weight, k, 0, r, i, depth, x);
        for (int64_t d = 0; d < depth; ++d) {
          const int64_t at = to + i * kDirectBlock + d;
          if (depth == 2) {
            from_float(x[d], static_cast<bf16*>(packed) + at);
          } else {
            static_cast<float*>(packed)[at] = bfloat16 ? rounded<bf16>(x[d]) : x[d];
          }
        }
      }
    }
  }
}

inline int64_t direct_scratch(const Conv& c) {
  const Geometry g = direct_geometry(c);
  return scratch_of(c, g, kDirectTile * kDirectBlock).bytes;
}

inline int64_t direct_tasks(const Conv& c) { return tasks_of(direct_geometry(c)); }

inline void direct_run(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  if (!c.bfloat16) return run_direct<float, false>(c, begin, end, scratch);
  if constexpr (kMultipliesPairs) {
    run_direct<bf16, kMultipliesPairs>(c, begin, end, scratch);
  } else {
    run_direct<bf16, false>(c, begin, end, scratch);
  }
}

static const ConvKernel direct = {
    "direct", direct_refusal, direct_packed_bytes, direct_pack_items, direct_pack, direct_scratch, direct_tasks, direct_run, nullptr};

}  // namespace fastres::FASTRES_ISA
