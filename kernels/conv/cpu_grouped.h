// Convolution in groups with vector multiply-adds, on every instruction set; bf16 is computed in float.
//
// A block is as many whole groups as fill a vector of output channels. For each tap and each channel j of a group, the positions' input
// vectors are permuted so that every lane meets channel j of its own group:
//     y[lane] += w[tap][j][lane] * x[group(lane)*(C/groups) + j]
// Depthwise convolutions need no permutation. Groups wider than half a vector are blocks of their own, and each input element is broadcast
// to one or two vectors of the group's output channels. A row of three taps at stride 1 shares the permuted vectors between neighbouring
// positions, as permutations take a multiply-add's place in the CPU.
//
// A task packs the panel of its band (see cpu_geometry.h) for some groups at a time. Reads x once into the panel, the weights once a band
// and the residual once; writes y once.
//
// Weights [blocks][subs][R][S][C/groups][lanes], or [R][C/groups][S] where taps share; lanes: one or two vectors, zero where a block
// doesn't fill them.
#pragma once

#include "cpu_direct.h"

namespace fastres::FASTRES_ISA {

enum class Lanes : int { same = 0, permuted = 1, broadcast = 2 };

// Narrower vectors have no instruction that permutes floats by an index.
constexpr bool kPermutes = kWidth >= 8;

struct GroupedPlan {
  Lanes lanes;
  int64_t c, k;           // channels of a group
  int64_t groups;         // of a block
  int64_t vectors, subs;  // a block's output channels: subs times so many vectors
  int64_t shared;         // taps that share loads: 3 or 1
  int64_t in, out;        // channels of a block
  int64_t sub_floats;     // of packed weights
};

FASTRES_INLINE GroupedPlan grouped_plan(const ConvShape& s) {
  GroupedPlan p{};
  p.c = s.in_channels / s.groups;
  p.k = s.out_channels / s.groups;
  const int64_t wider = max64(p.c, p.k);
  p.lanes = wider == 1 ? Lanes::same : kPermutes && wider * 2 <= kWidth ? Lanes::permuted : Lanes::broadcast;
  p.groups = p.lanes == Lanes::broadcast ? 1 : kWidth / wider;
  p.in = p.groups * p.c;
  p.out = p.groups * p.k;
  p.vectors = p.out > kWidth ? 2 : 1;
  p.subs = ceil_div(p.out, p.vectors * kWidth);
  const bool neighbours = s.kernel_w == 3 && s.stride_w == 1 && s.dilation_w == 1;
  p.shared = neighbours && p.lanes != Lanes::broadcast ? 3 : 1;
  p.sub_floats = s.kernel_h * s.kernel_w * p.c * p.vectors * kWidth;
  return p;
}

#if defined(__AVX512F__)
constexpr int kGroupedTile[3] = {0, 14, 14};  // positions, by vectors
#else
constexpr int kGroupedTile[3] = {0, 10, 6};
#endif

FASTRES_INLINE Geometry grouped_geometry(const Conv& c, const GroupedPlan& p) {
  constexpr int64_t channels = 64;  // packed at a time, where groups are smaller
  const int64_t chunk = max64(p.in, channels / p.in * p.in);
  return geometry_of(c, {4, 1, p.in, 0, false, 256 << 10, kGroupedTile[p.vectors], false, p.out, false, {chunk, chunk}});
}

struct GroupedTile {
  const float* a;          // first position, first channel of the block
  int64_t stride;          // floats from position to position
  const int64_t* offsets;  // [runs] floats
  int64_t runs, channels;
  const float* u;  // weights
  float* acc;      // [positions][vectors]
};

// The lanes' first channel, counted from the block's first.
struct LaneMap {
  int32_t first[kWidth];
};

template <Lanes L>
FASTRES_INLINE Vec grouped_operand(const float* p, int64_t j, [[maybe_unused]] Mask lanes) {
  if constexpr (L == Lanes::broadcast) return splat<Vec>(p[j]);
  Vec x;
  load(p, &x);
  if constexpr (L == Lanes::same) return x;
#if defined(__AVX512F__)
  x = (Vec)_mm512_permutexvar_ps((__m512i)lanes, (__m512)x);
#elif defined(__AVX2__)
  x = (Vec)_mm256_permutevar8x32_ps((__m256)x, (__m256i)lanes);
#endif
  return x;
}

// The registers: M positions x V vectors, S taps at a time.
template <Lanes L, int V, int S, int M>
__attribute__((noinline)) void grouped_tile(const GroupedTile& p, const LaneMap& map) {
  Vec sum[M][V] = {};
  Mask first;
  __builtin_memcpy(&first, map.first, sizeof first);
  const float* u = p.u;
  const int64_t stride = p.stride, stride3 = 3 * stride;
  for (int64_t r = 0; r < p.runs; r += S) {
    Mask lanes = first;
    const float* base[(M + S + 2) / 4];  // four positions share a base address, so that few address registers are needed
    for (int i = 0; i < (M + S + 2) / 4; ++i) base[i] = p.a + p.offsets[r] + 4 * i * stride;
    for (int64_t j = 0; j < p.channels; ++j, lanes += 1) {
      Vec w[S][V];
      for (int s = 0; s < S; ++s) {
        for (int v = 0; v < V; ++v, u += kWidth) load(u, &w[s][v]);
      }
#pragma GCC unroll 16
      for (int q = 0; q < M + S - 1; ++q) {
        const int64_t step = q % 4 == 0 ? 0 : q % 4 == 1 ? stride : q % 4 == 2 ? 2 * stride : stride3;
        const Vec x = grouped_operand<L>(base[q / 4] + step, j, lanes);
#pragma GCC unroll 3
        for (int s = 0; s < S; ++s) {
          if (q - s < 0 || q - s >= M) continue;
          for (int v = 0; v < V; ++v) sum[q - s][v] = fma(x, w[s][v], sum[q - s][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) store(p.acc + (m * V + v) * kWidth, sum[m][v]);
  }
}

// Positions past `count` are computed as well, up to the next of a few sizes; the panel has slack for them.
template <Lanes L, int V, int S, int M>
FASTRES_INLINE void grouped_any_tile(int count, const GroupedTile& p, const LaneMap& map) {
  if constexpr (M > 4) {
    constexpr int smaller = M > 10 ? 10 : M > 7 ? 7 : 4;
    if (count <= smaller) return grouped_any_tile<L, V, S, smaller>(count, p, map);
  }
  grouped_tile<L, V, S, M>(p, map);
}

FASTRES_INLINE void grouped_dispatch(const GroupedPlan& plan, int count, const GroupedTile& p, const LaneMap& map) {
  constexpr int one = kGroupedTile[1], two = kGroupedTile[2];
  if constexpr (kPermutes) {
    if (plan.lanes == Lanes::permuted && plan.shared == 3) return grouped_any_tile<Lanes::permuted, 1, 3, one>(count, p, map);
    if (plan.lanes == Lanes::permuted) return grouped_any_tile<Lanes::permuted, 1, 1, one>(count, p, map);
  }
  if (plan.lanes == Lanes::same && plan.shared == 3) return grouped_any_tile<Lanes::same, 1, 3, one>(count, p, map);
  if (plan.lanes == Lanes::same) return grouped_any_tile<Lanes::same, 1, 1, one>(count, p, map);
  if (plan.vectors == 2) return grouped_any_tile<Lanes::broadcast, 2, 1, two>(count, p, map);
  grouped_any_tile<Lanes::broadcast, 1, 1, one>(count, p, map);
}

FASTRES_INLINE DirectScratch grouped_scratch_of(const Conv& c, const Geometry& g) { return scratch_of(c, g, kMostTile * kDirectBlock); }

template <class T>
void run_grouped(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  const GroupedPlan plan = grouped_plan(c.shape);
  const Geometry g = grouped_geometry(c, plan);
  const DirectScratch at = grouped_scratch_of(c, g);
  char* base = static_cast<char*>(scratch);
  int64_t* offsets = reinterpret_cast<int64_t*>(base + at.offsets);
  Tile* tiles = reinterpret_cast<Tile*>(base + at.tiles);
  float* acc = reinterpret_cast<float*>(base + at.acc);
  const float* panel = reinterpret_cast<const float*>(base + at.panel);
  const Sums sums{reinterpret_cast<float*>(base + at.sums), g.blocks * plan.out};
  LaneMap map{};
  for (int64_t lane = 0; lane < kWidth && lane < plan.out; ++lane) map.first[lane] = static_cast<int32_t>(lane / plan.k * plan.c);
  const int64_t lanes = plan.vectors * kWidth;
  for (int64_t task = begin; task < end; ++task) {
    const Band b = band_of(g, task);
    PanelWriter w = writer_of(g, b, base + at.panel);
    for (int64_t r = 0; r < g.runs; ++r) offsets[r] = run_offset(g, b, r);
    const int64_t count = cut_into_tiles(g, b, tiles);
    __builtin_memset(sums.rows, 0, sum_rows(c) * sums.stride * sizeof(float));
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {  // here a chunk is some blocks: nothing is summed over chunks
      const int64_t first = max64(b.first_block, chunk_first(g, chunk) / plan.in);
      const int64_t last = min64(b.last_block, ceil_div(chunk_last(g, chunk), plan.in));
      if (first >= last) continue;
      w.first = first * plan.in;
      w.last = min64(last * plan.in, c.shape.in_channels);
      pack_panel<FloatPanel, T>(c, g, b, w);
      with_ends(c, [&]<Ends end_kind, bool residual>() {
        for (int64_t block = first; block < last; ++block) {
          const int64_t k_last = min64((block + 1) * plan.out, c.shape.out_channels);
          for (int64_t sub = 0; sub < plan.subs; ++sub) {
            const float* u = static_cast<const float*>(c.weights) + (block * plan.subs + sub) * plan.sub_floats;
            const int64_t k0 = block * plan.out + sub * lanes;
            for (int64_t i = 0; i < count; ++i) {
              const float* a = panel + tiles[i].v * g.pixel + (block - first) * plan.in;
              grouped_dispatch(plan, tiles[i].count, {a, g.pixel, offsets, g.runs, plan.c, u, acc}, map);
              finish_tile<T, end_kind, residual>(c, tiles[i], acc, lanes, k0, min64(lanes, k_last - k0), sums);
            }
          }
        }
      });
    }
    if (sum_rows(c) > 0) publish_sums(c, sums, task, b.first_block * plan.out, b.last_block * plan.out);
  }
}

// ---- the kernel as the engine sees it -------------------------------------------------------------------------------------------------
inline const char* grouped_refusal(const Conv& c) {
  if (c.part) return "parts of the output";
  return c.shape.groups == 1 ? "convolutions of one group" : nullptr;
}

inline int64_t grouped_pack_items(const ConvShape& s, bool) { return ceil_div(s.groups, grouped_plan(s).groups); }

inline int64_t grouped_packed_bytes(const ConvShape& s, bool bfloat16) {
  const GroupedPlan p = grouped_plan(s);
  return grouped_pack_items(s, bfloat16) * p.subs * p.sub_floats * 4;
}

inline void grouped_pack(const ConvShape& s, bool bfloat16, const WeightView& weight, void* packed, int64_t begin, int64_t end) {
  const GroupedPlan p = grouped_plan(s);
  const int64_t lanes = p.vectors * kWidth, taps = s.kernel_h * s.kernel_w;
  float* out = static_cast<float*>(packed) + begin * p.subs * p.sub_floats;
  for (int64_t sub = begin * p.subs; sub < end * p.subs; ++sub) {
    const int64_t k0 = sub / p.subs * p.out, offset = sub % p.subs * lanes;
    const int64_t present = max64(0, min64(min64(lanes, p.out - offset), s.out_channels - k0 - offset));
    for (int64_t row = 0; row < taps; row += p.shared) {
      for (int64_t j = 0; j < p.c; ++j) {
        for (int64_t tap = row; tap < row + p.shared; ++tap, out += lanes) {
          const float* from = weight.data + j * weight.in + (weight.reversed ? taps - 1 - tap : tap) * weight.tap_stride;
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const float x = lane < present ? from[(k0 + offset + lane) * weight.out] : 0.0f;
            out[lane] = bfloat16 ? rounded<bf16>(x) : x;
          }
        }
      }
    }
  }
}

inline int64_t grouped_scratch(const Conv& c) { return grouped_scratch_of(c, grouped_geometry(c, grouped_plan(c.shape))).bytes; }

inline int64_t grouped_tasks(const Conv& c) { return tasks_of(grouped_geometry(c, grouped_plan(c.shape))); }

inline void grouped_run(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  c.bfloat16 ? run_grouped<bf16>(c, begin, end, scratch) : run_grouped<float>(c, begin, end, scratch);
}

static const ConvKernel grouped = {"grouped",          grouped_refusal, grouped_packed_bytes,
                                   grouped_pack_items, grouped_pack,    grouped_scratch,
                                   grouped_tasks,      grouped_run,     nullptr};

}  // namespace fastres::FASTRES_ISA
