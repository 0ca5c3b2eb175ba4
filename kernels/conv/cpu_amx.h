// Direct convolution on AMX tiles: bf16 as it is, and float as six bf16 products.
//
// float: a value is hi + mid + lo, three bf16 that together hold its 24 bits exactly (Henry, Tang, Heinecke 2019). Of the nine products of
// two such values, the six that matter (hi*hi, hi*mid, mid*hi, mid*mid, hi*lo, lo*hi) are accumulated in float; what is left out is below
// 2^-24 of the product, so the result is as good as a chain of float multiply-adds, at more than twice the speed of one.
//
// A task packs the panel of its band (see cpu_geometry.h), then computes 32 positions x 32 channels at a time in four tiles. For each 32
// elements of K it loads 2 tiles of positions and 2 of weights (bf16: 4 loads, 4 products) or the three planes of both in an order that
// reuses what is loaded (float: 14 loads, 24 products). Reads x once into the panel, the band's share of the residual once, the weights
// once a band; writes y once.
//
// Many channels go in chunks: the sums of a band's tiles wait in memory for the next chunk, while panel and weights stay in the second
// cache.
//
// Weights [K/32][chunks][R*S * run/32][planes][2][16 pairs of K][16 channels][2], bf16: one stream a block.
#pragma once

#if defined(__AMX_BF16__)

#include "../common/cpu_tiles.h"
#include "cpu_direct.h"

namespace fastres::FASTRES_ISA {

constexpr int64_t kAmxBlock = 32;
constexpr int64_t kAmxTile = 512;  // elements of a tile: 16 rows of 32 bf16

FASTRES_INLINE PanelFormat amx_format(bool bfloat16) {
  return {2, bfloat16 ? 1 : 4, 32, 31, true, 800 << 10, 16, true, kAmxBlock, bfloat16, {bfloat16 ? 1024 : 512, bfloat16 ? 512 : 256}};
}

// What one call of the inner kernel needs.
struct AmxBlock {
  const bf16* a[2];        // first positions of the two tiles
  int64_t stride;          // bytes from position to position
  int64_t plane;           // elements from plane to plane
  const int64_t* offsets;  // [steps] elements from a to each step's 32 elements of K
  int64_t steps;
  const bf16* b;     // weights of the block
  float* acc;        // [32 positions][32 channels]
  bool special;      // plane 3 holds values that are not finite
  bool first;        // sums start at zero, not at what acc holds
  const bf16* next;  // weights to be brought into the second cache meanwhile,
  int64_t fetched;   // and how many lines of them a step
};

// Tiles 0-3: sums (position tile * 2 + channel tile); 4, 5: positions; 6, 7: weights.
template <bool Two>
FASTRES_INLINE void amx_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (Two) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool Split, bool Two>
__attribute__((noinline)) void amx_block(const AmxBlock& p) {
  const bf16* b = p.b;
  const bf16* next = p.next;
  if (p.first) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, p.acc, 128);
    _tile_loadd(1, p.acc + 16, 128);
    if constexpr (Two) {
      _tile_loadd(2, p.acc + 16 * 32, 128);
      _tile_loadd(3, p.acc + 16 * 32 + 16, 128);
    }
  }
  const int64_t stride = p.stride;
  // A tile store that follows 2048 cycles or more without one was measured to wait another 1000: one now and then keeps the unit awake.
  // What it writes is overwritten below.
  constexpr int64_t pulse = Split ? 4 : 16;
  for (int64_t i = 0; i < p.steps; ++i) {
    if (i % pulse == pulse - 1) _tile_stored(4, p.acc, 128);
    const bf16* a0 = p.a[0] + p.offsets[i];
    const bf16* a1 = p.a[1] + p.offsets[i];
    const auto positions = [&](int plane) __attribute__((always_inline)) {
      _tile_loadd(4, a0 + plane * p.plane, stride);
      if constexpr (Two) _tile_loadd(5, a1 + plane * p.plane, stride);
    };
    const auto weights = [&](int plane) __attribute__((always_inline)) {
      _tile_loadd(6, b + plane * 2 * kAmxTile, 64);
      _tile_loadd(7, b + plane * 2 * kAmxTile + kAmxTile, 64);
    };
    // The next step's weights into the first cache, a part after each group of products; the next block's into the second.
    const auto fetch = [&](int part) __attribute__((always_inline)) {
      if constexpr (Split) {
        const char* at = reinterpret_cast<const char*>(b) + (6 + part) * 1024;
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) _mm_prefetch(at + j * 64, _MM_HINT_T0);
      }
    };
    for (int64_t j = 0; j < p.fetched; ++j, next += 32) _mm_prefetch(next, _MM_HINT_T1);
    if constexpr (Split) {
      // The staircase of products, smallest first where that costs nothing; each move changes one side only.
      positions(0);
      weights(2);
      amx_products<Two>();
      fetch(0);
      weights(1);
      amx_products<Two>();
      fetch(1);
      positions(1);
      amx_products<Two>();
      fetch(2);
      weights(0);
      amx_products<Two>();
      fetch(3);
      positions(2);
      amx_products<Two>();
      fetch(4);
      positions(0);
      amx_products<Two>();
      fetch(5);
      if (__builtin_expect(p.special, 0)) {
        positions(3);
        amx_products<Two>();
      }
      b += 3 * 2 * kAmxTile;
    } else {
      positions(0);
      weights(0);
      amx_products<Two>();
      fetch(0);
      b += 2 * kAmxTile;
    }
  }
  _tile_stored(0, p.acc, 128);
  _tile_stored(1, p.acc + 16, 128);
  if constexpr (Two) {
    _tile_stored(2, p.acc + 16 * 32, 128);
    _tile_stored(3, p.acc + 16 * 32 + 16, 128);
  }
}

// The last tile of an in-place panel must not read past x: it starts earlier, and what the tile before has stored already is junk.
FASTRES_INLINE void pull_back(Tile& t, int64_t positions) {
  const int64_t by = t.v + 16 - positions;
  if (by <= 0) return;
  Tile moved = t;
  moved.v = t.v - by;
  moved.count = 16;
  for (int64_t j = 0; j < 16; ++j) moved.out[j] = j < by ? -1 : t.out[j - by];
  t = moved;
}

template <class T>
struct AmxPanelOf {
  using type = SplitPanel;
};
template <>
struct AmxPanelOf<bf16> {
  using type = HalfPanel;
};

FASTRES_INLINE int64_t amx_steps(const Geometry& g, int64_t chunk) { return g.runs * chunk_run(g, chunk) / 32; }

FASTRES_INLINE int64_t amx_steps_before(const Geometry& g, int64_t chunk) { return chunk * g.runs * g.run / 32; }

// Elements of a block's packed weights.
FASTRES_INLINE int64_t amx_block_elements(const Geometry& g, int64_t planes) {
  return (amx_steps_before(g, g.chunks - 1) + amx_steps(g, g.chunks - 1)) * planes * 2 * kAmxTile;
}

// Floats of sums that wait for the next chunk: 32 x 32 for each pair of tiles and each block of a task.
FASTRES_INLINE int64_t amx_sums(const Geometry& g) {
  return 32 * 32 * (g.chunks == 1 ? 1 : ceil_div(most_tiles(g), 2) * ceil_div(g.blocks, g.splits));
}

// The sums of a pair of tiles, one product after another. Where positions overlap, the zeros behind a run's weights meet values of other
// positions, which must not be infinite or NaN: the tiles can't be used then.
template <bool Split>
void amx_plain_block(const Geometry& g, const AmxBlock& p) {
  const int64_t real = g.s.kernel_w * g.s.in_channels, steps = g.run / 32;
  const auto wide = [](bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); };
  for (int64_t j = 0; j < 32; ++j) {
    float* acc = p.acc + j * 32;
    for (int64_t k = 0; k < 32; ++k) acc[k] = 0;
    const bf16* at = p.a[j / 16] + j % 16 * p.stride / 2;
    for (int64_t run = 0; run < g.runs; ++run) {
      for (int64_t i = 0; i < real; ++i) {
        const bf16* x = at + p.offsets[run * steps + i / 32] + i % 32;
        float value = 0;
        for (int plane = Split ? 3 : 0; plane >= 0; --plane) value += wide(x[plane * p.plane]);
        const bf16* w = p.b + (run * steps + i / 32) * (Split ? 3 : 1) * 2 * kAmxTile + i % 32 / 2 * 32 + i % 2;
        for (int64_t k = 0; k < 32; ++k) {
          float weight = 0;
          for (int plane = Split ? 2 : 0; plane >= 0; --plane) weight += wide(w[(plane * 2 + k / 16) * kAmxTile + k % 16 * 2]);
          acc[k] += value * weight;
        }
      }
    }
  }
}

// What a task works with: the scratch, cut into pieces.
template <class T>
struct AmxTask {
  static constexpr bool kSplit = sizeof(T) == sizeof(float);
  static constexpr int64_t kPlanes = kSplit ? 3 : 1;
  using Panel = typename AmxPanelOf<T>::type;

  const Conv& c;
  const Geometry& g;
  int64_t* offsets;  // [steps of a chunk]
  Tile* tiles;
  float* acc;  // [amx_sums]
  Sums sums;
  char* panel;

  // Adds one chunk of channels to all sums of a band; the last one finishes them.
  template <Ends E, bool HasResidual>
  void sum_chunk(const Band& b, int64_t count, int64_t chunk) const {
    PanelWriter w = writer_of(g, b, panel);
    w.first = chunk_first(g, chunk);
    w.last = chunk_last(g, chunk);
    const bf16* positions = reinterpret_cast<const bf16*>(panel);
    if (g.in_place) {
      positions = static_cast<const bf16*>(c.x) + b.row * g.pixel + w.first;
    } else {
      pack_panel<Panel, T>(c, g, b, w);
    }
    const int64_t steps = amx_steps(g, chunk), per_run = chunk_run(g, chunk) / 32;
    for (int64_t i = 0; i < steps; ++i) offsets[i] = run_offset(g, b, i / per_run) + i % per_run * 32;
    const int64_t per_block = amx_block_elements(g, kPlanes);
    const bf16* weights = static_cast<const bf16*>(c.weights) + amx_steps_before(g, chunk) * kPlanes * 2 * kAmxTile;
    const bool last = chunk + 1 == g.chunks;
    AmxBlock p{{nullptr, nullptr}, g.pixel * 2, w.plane, offsets, steps, nullptr, acc, w.special, chunk == 0, nullptr, 0};
    asm volatile("" ::: "memory");  // tile loads are opaque to the compiler: what was packed must be in memory
    // Where there are products enough to hide it, a block's weights arrive in the second cache while the one before is computed. With few,
    // the hardware's own prefetching reads faster: a prefetch instruction occupies the first cache's few buffers until its line is there.
    const int64_t pairs = ceil_div(count, 2);
    const int64_t fetched = pairs >= 6 && steps * kPlanes * 2048 <= (320 << 10) ? ceil_div(kPlanes * 32, pairs) : 0;
    const auto one = [&](int64_t block, int64_t i) __attribute__((always_inline)) {
      const bool two = i + 1 < count;
      p.a[0] = positions + tiles[i].v * g.pixel;
      p.a[1] = positions + tiles[two ? i + 1 : i].v * g.pixel;
      p.b = weights + block * per_block;
      p.next = weights + (block + 1) * per_block + i / 2 * steps * fetched * 32;
      p.fetched = block + 1 < b.last_block ? fetched : 0;
      if (g.chunks > 1) p.acc = acc + ((block - b.first_block) * ceil_div(count, 2) + i / 2) * 32 * 32;
      if (__builtin_expect(g.overlap && p.special, 0)) {
        amx_plain_block<kSplit>(g, p);
      } else {
        two ? amx_block<kSplit, true>(p) : amx_block<kSplit, false>(p);
      }
      if (!last) return;
      const int64_t k0 = block * kAmxBlock, channels = min64(kAmxBlock, c.shape.out_channels - k0);
      finish_tile<T, E, HasResidual>(c, tiles[i], p.acc, 32, k0, channels, sums);
      if (two) finish_tile<T, E, HasResidual>(c, tiles[i + 1], p.acc + 16 * 32, 32, k0, channels, sums);
    };
    // Where two tiles of positions fit the first cache and all weights the second, each position is read once for all channels.
    const bool positions_first =
        g.chunks == 1 && steps * 64 * 32 * kPlanes <= (24 << 10) && (b.last_block - b.first_block) * per_block * 2 <= (512 << 10);
    if (positions_first) {
      for (int64_t i = 0; i < count; i += 2) {
        for (int64_t block = b.first_block; block < b.last_block; ++block) one(block, i);
      }
    } else {
      for (int64_t block = b.first_block; block < b.last_block; ++block) {
        for (int64_t i = 0; i < count; i += 2) one(block, i);
      }
    }
  }
};

template <class T>
void run_amx(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  const Geometry g = geometry_of(c, amx_format(sizeof(T) != sizeof(float)));
  const DirectScratch at = scratch_of(c, g, amx_sums(g));
  char* base = static_cast<char*>(scratch);
  const AmxTask<T> run{c,
                       g,
                       reinterpret_cast<int64_t*>(base + at.offsets),
                       reinterpret_cast<Tile*>(base + at.tiles),
                       reinterpret_cast<float*>(base + at.acc),
                       {reinterpret_cast<float*>(base + at.sums), g.blocks * kAmxBlock},
                       base + at.panel};
  configure_tiles();
  for (int64_t task = begin; task < end; ++task) {
    const Band b = band_of(g, task);
    const int64_t count = cut_into_tiles(g, b, run.tiles);
    if (g.in_place && count > 0) pull_back(run.tiles[count - 1], g.s.out_height - b.row);
    __builtin_memset(run.sums.rows, 0, sum_rows(c) * run.sums.stride * sizeof(float));
    with_ends(c, [&]<Ends end_kind, bool residual>() {
      for (int64_t chunk = 0; chunk < g.chunks; ++chunk) run.template sum_chunk<end_kind, residual>(b, count, chunk);
    });
    if (sum_rows(c) > 0) publish_sums(c, run.sums, task, b.first_block * kAmxBlock, b.last_block * kAmxBlock);
  }
  _tile_release();
}

// ---- the kernel as the engine sees it -------------------------------------------------------------------------------------------------
FASTRES_INLINE Geometry amx_geometry(const Conv& c) { return geometry_of(c, amx_format(c.bfloat16)); }

inline const char* amx_refusal(const Conv& c) { return direct_refusal(c); }

// With few positions time goes into reading the weights, which are 6 bytes each here for float and 4 in the direct kernel.
inline bool amx_suits(const Conv& c) { return c.bfloat16 || c.shape.images * c.shape.out_height * c.shape.out_width >= 8; }

inline int64_t amx_packed_bytes(const ConvShape& s, bool bfloat16) {
  const Geometry g = amx_geometry(packing_problem(s, bfloat16));
  return g.blocks * amx_block_elements(g, bfloat16 ? 1 : 3) * 2;
}

inline int64_t amx_pack_items(const ConvShape& s, bool) { return ceil_div(s.out_channels, kAmxBlock); }

// 32 neighbouring weights of one output channel into its column of the tiles of one step: [planes][2 channel tiles][16 pairs][16][2].
FASTRES_INLINE void pack_weights(const float* x, int64_t planes, int64_t k, bf16* out) {
  alignas(64) float rest[32];
  alignas(64) bf16 part[32];
  __builtin_memcpy(rest, x, sizeof rest);
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t i = 0; i < 32; i += kWidth) {  // the nearest bf16, the nearest to what is left, and the nearest to the rest
      Vec v;
      load(rest + i, &v);
      const Vec kept = rounded<bf16>(v);
      store(part + i, kept);
      const Vec left = v - kept;
      store(rest + i, (left == left) ? left : Vec{});  // infinity and NaN stay in the first part
    }
    bf16* to = out + (plane * 2 + k / 16) * kAmxTile + k % 16 * 2;
    for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(to + i * 32, part + 2 * i, 4);
  }
}

inline void amx_pack(const ConvShape& s, bool bfloat16, const WeightView& weight, void* packed, int64_t begin, int64_t end) {
  const Geometry g = amx_geometry(packing_problem(s, bfloat16));
  const int64_t planes = bfloat16 ? 1 : 3, step = planes * 2 * kAmxTile;
  for (int64_t block = begin; block < end; ++block) {
    bf16* out = static_cast<bf16*>(packed) + block * amx_block_elements(g, planes);
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      const int64_t run = chunk_run(g, chunk);
      for (int64_t i = 0; i < g.runs * run; i += 32, out += step) {
        for (int64_t k = 0; k < kAmxBlock; ++k) {
          const int64_t channel = block * kAmxBlock + k;
          alignas(64) float x[32] = {};
          if (channel < s.out_channels) gather_weights(s, g, weight, channel, chunk, i / run, i % run, 32, x);
          pack_weights(x, planes, k, out);
        }
      }
    }
  }
}

inline int64_t amx_scratch(const Conv& c) {
  const Geometry g = amx_geometry(c);
  return scratch_of(c, g, amx_sums(g)).bytes;
}

inline int64_t amx_tasks(const Conv& c) { return tasks_of(amx_geometry(c)); }

inline void amx_run(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  c.bfloat16 ? run_amx<bf16>(c, begin, end, scratch) : run_amx<float>(c, begin, end, scratch);
}

static const ConvKernel amx = {"amx", amx_refusal, amx_packed_bytes, amx_pack_items, amx_pack, amx_scratch, amx_tasks, amx_run, amx_suits};

}  // namespace fastres::FASTRES_ISA

#endif  // __AMX_BF16__
