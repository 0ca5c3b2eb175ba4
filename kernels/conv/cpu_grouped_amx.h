// Convolution in groups on AMX tiles, as cpu_amx.h computes ordinary ones.
//
// A block is as many whole groups as have 32 input channels; its weights are a matrix [32, outputs] with zeros where input and output are
// of different groups. So narrow groups waste products, and kAmxNarrowest says where vectors are faster. Wider groups are blocks of their
// own.
//
// A task packs the panel of its band (see cpu_geometry.h) for some blocks at a time. Reads x once into the panel, the weights once a band
// and the residual once; writes y once.
//
// Weights [blocks][subs][R*S * in/32][planes][2][16 pairs of channels][16 outputs][2], bf16; a sub is 32 of a block's outputs.
#pragma once

#if defined(__AMX_BF16__)

#include "cpu_amx.h"

namespace fastres::FASTRES_ISA {

constexpr int64_t kAmxNarrowest[2] = {32, 4};  // input channels of a group: float, bf16

struct AmxGroups {
  int64_t c, k;     // channels of a group
  int64_t groups;   // of a block
  int64_t in, out;  // channels of a block
  int64_t subs, steps, sub_elements, planes;
};

FASTRES_INLINE AmxGroups amx_groups(const ConvShape& s, bool bfloat16) {
  AmxGroups p{};
  p.c = s.in_channels / s.groups;
  p.k = s.out_channels / s.groups;
  p.groups = max64(1, 32 / max64(1, p.c));
  p.in = p.groups * p.c;
  p.out = p.groups * p.k;
  p.subs = ceil_div(p.out, kAmxBlock);
  p.planes = bfloat16 ? 1 : 3;
  p.steps = s.kernel_h * s.kernel_w * p.in / 32;
  p.sub_elements = p.steps * p.planes * 2 * kAmxTile;
  return p;
}

FASTRES_INLINE Geometry grouped_amx_geometry(const Conv& c, const AmxGroups& p) {
  PanelFormat format = amx_format(c.bfloat16);
  format.unit = p.in;
  format.columns_to = 0;
  format.block = p.out;
  format.in_place = false;
  format.chunk[0] = format.chunk[1] = max64(p.in, 128 / p.in * p.in);
  return geometry_of(c, format);
}

// The sums of one tile again, each lane from its own group alone: what is not finite must not reach other groups as 0*infinity.
FASTRES_INLINE void amx_group_by_group(const AmxBlock& p, const AmxGroups& g, int64_t tile, int64_t lanes) {
  const int64_t planes = g.planes == 1 ? 1 : p.special ? 4 : 3;
  for (int64_t row = 0; row < 16; ++row) {
    const bf16* a = p.a[tile] + row * p.stride / 2;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      float sum = 0;
      for (int64_t i = 0; i < p.steps; ++i) {
        for (int64_t j = lane / g.k * g.c; j < lane / g.k * g.c + g.c; ++j) {
          float x = 0, w = 0;
          for (int64_t plane = 0; plane < planes; ++plane) x += to_float(a[plane * p.plane + p.offsets[i] + j]);
          for (int64_t plane = 0; plane < g.planes; ++plane) {
            w += to_float(p.b[((i * g.planes + plane) * 2 + lane / 16) * kAmxTile + j / 2 * 32 + lane % 16 * 2 + j % 2]);
          }
          sum = fma(x, w, sum);
        }
      }
      p.acc[(tile * 16 + row) * 32 + lane] = sum;
    }
  }
}

FASTRES_INLINE bool all_finite(const Tile& t, const float* acc) {
  Vec zero[2] = {};
  for (int64_t row = 0; row < t.count; ++row) {
    if (t.out[row] < 0) continue;
    for (int64_t i = 0; i < 2; ++i) {
      Vec x;
      load(acc + row * 32 + i * kWidth, &x);
      zero[i] = fma(x, Vec{}, zero[i]);
    }
  }
  const Vec both = zero[0] + zero[1];
  return _mm512_cmp_ps_mask((__m512)both, (__m512)both, _CMP_UNORD_Q) == 0;
}

template <class T>
void run_grouped_amx(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  constexpr bool split = sizeof(T) == sizeof(float);
  const AmxGroups groups = amx_groups(c.shape, c.bfloat16);
  const Geometry g = grouped_amx_geometry(c, groups);
  const DirectScratch at = scratch_of(c, g, 32 * 32);
  char* base = static_cast<char*>(scratch);
  int64_t* offsets = reinterpret_cast<int64_t*>(base + at.offsets);
  Tile* tiles = reinterpret_cast<Tile*>(base + at.tiles);
  const Sums sums{reinterpret_cast<float*>(base + at.sums), g.blocks * groups.out};
  configure_tiles();
  for (int64_t task = begin; task < end; ++task) {
    const Band b = band_of(g, task);
    const int64_t count = cut_into_tiles(g, b, tiles), per_run = groups.in / 32;
    for (int64_t i = 0; i < groups.steps; ++i) offsets[i] = run_offset(g, b, i / per_run) + i % per_run * 32;
    __builtin_memset(sums.rows, 0, sum_rows(c) * sums.stride * sizeof(float));
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {  // here a chunk is some blocks: nothing is summed over chunks
      const int64_t first = max64(b.first_block, chunk_first(g, chunk) / groups.in);
      const int64_t last = min64(b.last_block, ceil_div(chunk_last(g, chunk), groups.in));
      if (first >= last) continue;
      PanelWriter w = writer_of(g, b, base + at.panel);
      w.first = first * groups.in;
      w.last = min64(last * groups.in, c.shape.in_channels);
      pack_panel<typename AmxPanelOf<T>::type, T>(c, g, b, w);
      asm volatile("" ::: "memory");  // tile loads are opaque to the compiler: what was packed must be in memory
      const bf16* panel = reinterpret_cast<const bf16*>(base + at.panel);
      float* acc = reinterpret_cast<float*>(base + at.acc);
      with_ends(c, [&]<Ends end_kind, bool residual>() {
        for (int64_t sub = first * groups.subs; sub < last * groups.subs; ++sub) {
          const int64_t block = sub / groups.subs, k0 = block * groups.out + sub % groups.subs * kAmxBlock;
          const int64_t lanes = min64(kAmxBlock, min64((block + 1) * groups.out, c.shape.out_channels) - k0);
          const bf16* positions = panel + (block - first) * groups.in;
          const bf16* weights = static_cast<const bf16*>(c.weights) + sub * groups.sub_elements;
          for (int64_t i = 0; i < count; i += 2) {
            const bool two = i + 1 < count;
            const AmxBlock p{{positions + tiles[i].v * g.pixel, positions + tiles[two ? i + 1 : i].v * g.pixel},
                             g.pixel * 2,
                             w.plane,
                             offsets,
                             groups.steps,
                             weights,
                             acc,
                             w.special,
                             true,
                             nullptr,
                             0};
            two ? amx_block<split, true>(p) : amx_block<split, false>(p);
            for (int64_t tile = 0; tile < 1 + two; ++tile) {
              const Tile& t = tiles[i + tile];
              float* own = acc + tile * 16 * 32;
              if (groups.groups > 1 && __builtin_expect(!all_finite(t, own), 0)) amx_group_by_group(p, groups, tile, lanes);
              finish_tile<T, end_kind, residual>(c, t, own, 32, k0, lanes, sums);
            }
          }
        }
      });
    }
    if (sum_rows(c) > 0) publish_sums(c, sums, task, b.first_block * groups.out, b.last_block * groups.out);
  }
  _tile_release();
}

// ---- the kernel as the engine sees it -------------------------------------------------------------------------------------------------
inline const char* grouped_amx_refusal(const Conv& c) {
  const int64_t channels = c.shape.in_channels / c.shape.groups, outputs = c.shape.out_channels / c.shape.groups;
  if (c.shape.groups == 1) return "convolutions of one group";
  if (c.part) return "parts of the output";
  if (channels < kAmxNarrowest[c.bfloat16] || (32 % channels != 0 && channels % 32 != 0)) return "groups of so many input channels";
  if (channels < 32 && 32 / channels * outputs > 32) return "narrow groups with more outputs than inputs";
  return nullptr;
}

inline int64_t grouped_amx_pack_items(const ConvShape& s, bool bfloat16) { return ceil_div(s.groups, amx_groups(s, bfloat16).groups); }

inline int64_t grouped_amx_packed_bytes(const ConvShape& s, bool bfloat16) {
  const AmxGroups p = amx_groups(s, bfloat16);
  return grouped_amx_pack_items(s, bfloat16) * p.subs * p.sub_elements * 2;
}

inline void grouped_amx_pack(const ConvShape& s, bool bfloat16, const WeightView& weight, void* packed, int64_t begin, int64_t end) {
  const AmxGroups p = amx_groups(s, bfloat16);
  const int64_t taps = s.kernel_h * s.kernel_w;
  for (int64_t sub = begin * p.subs; sub < end * p.subs; ++sub) {
    bf16* out = static_cast<bf16*>(packed) + sub * p.sub_elements;
    for (int64_t i = 0; i < p.steps; ++i, out += p.planes * 2 * kAmxTile) {
      const int64_t tap = i / (p.in / 32), channel = i % (p.in / 32) * 32;
      for (int64_t lane = 0; lane < kAmxBlock; ++lane) {
        const int64_t k = sub % p.subs * kAmxBlock + lane, global = sub / p.subs * p.out + k;
        alignas(64) float x[32] = {};
        if (k < p.out && global < s.out_channels) {
          const float* from = weight.data + global * weight.out + (weight.reversed ? taps - 1 - tap : tap) * weight.tap_stride;
          const int64_t first = k / p.k * p.c - channel;  // of the output's own group, among the step's 32 channels
          for (int64_t j = max64(0, -first); j < p.c && first + j < 32; ++j) x[first + j] = from[j * weight.in];
        }
        pack_weights(x, p.planes, lane, out);
      }
    }
  }
}

inline int64_t grouped_amx_scratch(const Conv& c) {
  return scratch_of(c, grouped_amx_geometry(c, amx_groups(c.shape, c.bfloat16)), 32 * 32).bytes;
}

inline int64_t grouped_amx_tasks(const Conv& c) { return tasks_of(grouped_amx_geometry(c, amx_groups(c.shape, c.bfloat16))); }

inline void grouped_amx_run(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  c.bfloat16 ? run_grouped_amx<bf16>(c, begin, end, scratch) : run_grouped_amx<float>(c, begin, end, scratch);
}

static const ConvKernel grouped_amx = {"grouped_amx",          grouped_amx_refusal, grouped_amx_packed_bytes,
                                       grouped_amx_pack_items, grouped_amx_pack,    grouped_amx_scratch,
                                       grouped_amx_tasks,      grouped_amx_run,     nullptr};

}  // namespace fastres::FASTRES_ISA

#endif  // __AMX_BF16__
