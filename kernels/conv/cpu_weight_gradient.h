// The gradient of a convolution's weights on AMX tiles: dw[k, tap, c] = sum over positions of g[position, k] * a[position + tap, c], with
// a = prologue(x) and g the gradient of y with the share of the statistics, both computed on their way into the panels.
//
// It is the product of cpu_amx.h with other roles: rows are input channels, K is positions, and what was the weights is the gradient. A
// band of output rows is packed as a transposed, [C, positions], float split into three planes, and as g in pairs of positions,
// [K/32][positions/32][planes][2][16 pairs][16 channels][2]; a tap is an offset into the positions, as in cpu_geometry.h. Sums of 32 x 32
// channels stay in tiles for a whole band. Reads x and g once a task; a task owns a range of output channels and of images and writes one
// partial dw, [K/32][R*S][C/32][32 c][32 k].
//
// Values that are not finite make NaN of the weights' gradients they touch (also where PyTorch would give infinity).
#pragma once

#if defined(__AMX_BF16__)

#include "cpu_amx.h"

namespace fastres::FASTRES_ISA {

constexpr int64_t kGradientPanel = 1400 << 10;  // bytes of both panels
constexpr int64_t kGradientChunk = 128;         // input channels that are packed at a time
constexpr int64_t kGradientSteps = 4;           // of 32 positions that all taps share while they are in the first cache (float)

struct GradientCut {
  Geometry g;  // pitch, phases and rows of the positions; g.rows and g.images of a band
  bool flat;
  int64_t chunk;           // input channels packed at a time
  int64_t groups, splits;  // tasks = groups of images (flat: of positions) * ranges of blocks
  int64_t bands_per_group;
};

FASTRES_INLINE int64_t gradient_planes(const WeightGradient& p) { return p.input.bfloat16 ? 1 : 3; }

FASTRES_INLINE int64_t gradient_positions(const GradientCut& cut, int64_t images, int64_t rows) {
  return round_up(images * panel_rows(cut.g, rows) * cut.g.pitch, 32);
}

// Elements from channel to channel of the transposed panel: an odd number of cache lines; taps reach past the last position.
FASTRES_INLINE int64_t channel_stride(const GradientCut& cut, int64_t images, int64_t rows) {
  const ConvShape& s = cut.g.s;
  const int64_t reach = ((s.kernel_h - 1) * s.dilation_h / s.stride_h) * cut.g.pitch + (s.kernel_w - 1) * s.dilation_w + 64;
  return round_up(cut.g.phases_h * cut.g.phases_w * gradient_positions(cut, images, rows) + reach, 64) + 32;
}

FASTRES_INLINE int64_t gradient_panel_bytes(const GradientCut& cut, int64_t planes, int64_t images, int64_t rows) {
  const int64_t blocks = ceil_div(cut.g.blocks, cut.splits);
  return planes * 2 * (cut.chunk * channel_stride(cut, images, rows) + blocks * 32 * gradient_positions(cut, images, rows));
}

FASTRES_INLINE GradientCut gradient_cut(const WeightGradient& p) {
  GradientCut cut{};
  Conv c = p.input;
  c.threads = 1;
  PanelFormat format = amx_format(p.input.bfloat16);
  format.columns_to = 0;
  format.in_place = false;
  cut.g = geometry_of(c, format);
  Geometry& g = cut.g;
  cut.flat = is_flat(p.input.shape);
  cut.chunk = round_up(min64(kGradientChunk, g.s.in_channels), 16);
  const int64_t planes = gradient_planes(p), threads = p.input.threads;
  const int64_t rows = g.s.out_height, units = cut.flat ? ceil_div(rows, 512) : g.s.images;
  // Threads share the output channels first: no partial sums to add. Small weights are shared by images as well.
  cut.splits = min64(g.blocks, threads);
  cut.groups = max64(1, min64(units, threads / cut.splits));
  g.images = 1;
  g.rows = cut.flat ? round_up(ceil_div(rows, cut.groups), 32) : rows;
  while (g.rows > (cut.flat ? 64 : 1) && gradient_panel_bytes(cut, planes, 1, g.rows) > kGradientPanel) {
    g.rows = cut.flat ? round_up(g.rows / 2, 32) : ceil_div(g.rows, 2);
  }
  if (!cut.flat && g.rows == rows) {
    const int64_t most = ceil_div(g.s.images, cut.groups);
    while (g.images < most && gradient_panel_bytes(cut, planes, g.images + 1, rows) <= kGradientPanel) ++g.images;
  }
  g.bands = ceil_div(g.s.images, g.images) * ceil_div(rows, g.rows);
  cut.bands_per_group = ceil_div(g.bands, cut.groups);
  return cut;
}

FASTRES_INLINE int64_t gradient_elements(const GradientCut& cut) {
  return cut.g.blocks * cut.g.s.kernel_h * cut.g.s.kernel_w * ceil_div(cut.g.s.in_channels, 32) * 1024;
}

// 16 positions x 16 channels, transposed in registers.
FASTRES_INLINE void transpose16(__m512 (&x)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    x[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    x[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    x[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Neighbouring positions of one row: `before` zeros, `count` pixels from element `from`, `step` elements apart, zeros up to `length`.
struct PixelRow {
  int64_t from, step, before, count, length;
};

// Upper halves of 32 floats; then what the next plane is taken from.
FASTRES_INLINE __m512i upper_halves(Vec& x, Vec& y, __m512i pick) {
  const __m512i out = _mm512_permutex2var_epi16((__m512i)x, pick, (__m512i)y);
  x -= (Vec)((Bits)x & 0xffff0000u);
  y -= (Vec)((Bits)y & 0xffff0000u);
  return out;
}

// A row into channels [first, last) of the transposed panel; whole groups of 32 positions are written, the row behind comes after.
template <Reads R, class T>
void pack_transposed(const Conv& c, const PixelRow& row, int64_t first, int64_t last, int64_t planes, int64_t stride, int64_t plane,
                     bf16* to) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i pick = _mm512_load_si512(kUpper);
  for (int64_t k = first; k < last; k += 16) {
    const int64_t lanes = min64(16, c.shape.in_channels - k);
    for (int64_t v = 0; v < row.length; v += 32) {
      __m512 x[2][16];
      for (int64_t j = 0; j < 32; ++j) {
        const int64_t i = v + j - row.before;
        Vec value{};
        if (i >= 0 && i < row.count) {
          const int64_t at = row.from + i * row.step + k;
          value = lanes == 16 ? read_vector<R, T, false>(c, at, k, 16) : read_vector<R, T, true>(c, at, k, lanes);
        }
        x[j / 16][j % 16] = (__m512)value;
      }
      transpose16(x[0]);
      transpose16(x[1]);
      for (int64_t j = 0; j < 16; ++j) {
        Vec a = (Vec)x[0][j], b = (Vec)x[1][j];
        bf16* out = to + (k - first + j) * stride + v;
        for (int64_t p = 0; p < planes; ++p) _mm512_storeu_si512(out + p * plane, upper_halves(a, b, pick));
      }
    }
  }
}

// g of a band in pairs of positions, for the blocks of a task. source[v]: element of position v's first channel, or -1.
template <Reads R, class T>
void pack_pairs(const Conv& c, const int64_t* source, int64_t positions, int64_t first_block, int64_t last_block, int64_t planes,
                bf16* to) {
  const int64_t K = c.shape.in_channels;
  for (int64_t block = first_block; block < last_block; ++block) {
    for (int64_t v = 0; v < positions; v += 32, to += planes * 2 * kAmxTile) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t k = block * 32 + half * 16, lanes = min64(16, K - k);
        for (int64_t pair = 0; pair < 16; ++pair) {
          Vec x[2] = {};
          for (int i = 0; i < 2; ++i) {
            const int64_t at = source[v + 2 * pair + i];
            if (at < 0 || lanes <= 0) continue;
            x[i] = lanes == 16 ? read_vector<R, T, false>(c, at + k, k, 16) : read_vector<R, T, true>(c, at + k, k, lanes);
          }
          for (int64_t p = 0; p < planes; ++p) {
            const Bits a = (Bits)x[0], b = (Bits)x[1] & 0xffff0000u;
            const Bits word = (a >> 16) | b;
            __builtin_memcpy(to + (p * 2 + half) * kAmxTile + pair * 32, &word, sizeof word);
            x[0] -= (Vec)(a & 0xffff0000u);
            x[1] -= (Vec)b;
          }
        }
      }
    }
  }
}

struct GradientScratch {
  int64_t offsets, source, gradient, panel, bytes;
};

FASTRES_INLINE GradientScratch gradient_scratch_of(const WeightGradient& p, const GradientCut& cut) {
  const int64_t planes = gradient_planes(p), positions = gradient_positions(cut, cut.g.images, cut.g.rows);
  GradientScratch s;
  s.offsets = 0;
  s.source = round_up(positions / 32 * 8, 64);
  s.gradient = s.source + positions * 8;
  s.panel = s.gradient + ceil_div(cut.g.blocks, cut.splits) * 32 * positions * planes * 2;
  s.bytes = s.panel + cut.chunk * channel_stride(cut, cut.g.images, cut.g.rows) * planes * 2 + 256;
  return s;
}

// Calls f with what is done to values on their way in.
template <class F>
FASTRES_INLINE void with_reads(const Conv& c, F&& f) {
  switch (reads_of(c)) {
    case Reads::plain: return f.template operator()<Reads::plain>();
    case Reads::affine: return f.template operator()<Reads::affine>();
    case Reads::affine_relu: return f.template operator()<Reads::affine_relu>();
    case Reads::gradient: return f.template operator()<Reads::gradient>();
  }
}

template <class T>
struct GradientTask {
  const WeightGradient& p;
  const GradientCut& cut;
  GradientScratch at;
  char* base;

  int64_t* source() const { return reinterpret_cast<int64_t*>(base + at.source); }

  void fill_source(const Band& b, int64_t positions) const {
    const ConvShape& s = cut.g.s;
    int64_t* out = source();
    int64_t v = 0;
    for (int64_t i = 0; i < b.images; ++i) {
      for (int64_t r = 0; r < panel_rows(cut.g, b.rows); ++r) {
        const int64_t first = ((b.image + i) * s.out_height + b.row + r) * s.out_width * s.out_channels;
        for (int64_t q = 0; q < cut.g.pitch; ++q, ++v) out[v] = r < b.rows && q < s.out_width ? first + q * s.out_channels : -1;
      }
    }
    for (; v < positions; ++v) out[v] = -1;
  }

  template <Reads R>
  void pack_input(const Band& b, int64_t first, int64_t last, int64_t stride, int64_t plane) const {
    const Geometry& g = cut.g;
    const ConvShape& s = g.s;
    bf16* to = reinterpret_cast<bf16*>(base + at.panel);
    const int64_t planes = gradient_planes(p), positions = gradient_positions(cut, b.images, b.rows);
    const auto row_of = [&](const PixelRow& row, int64_t v) __attribute__((always_inline)) {
      pack_transposed<R, T>(p.input, row, first, last, planes, stride, plane, to + v);
    };
    if (cut.flat) return row_of({b.row * s.in_channels, s.in_channels, 0, b.rows, stride - 32}, 0);
    for (int64_t phase = 0; phase < g.phases_h * g.phases_w; ++phase) {
      const int64_t ph = phase / g.phases_w, pw = phase % g.phases_w;
      int64_t v = phase * positions;
      for (int64_t i = 0; i < b.images; ++i) {
        for (int64_t r = 0; r < panel_rows(g, b.rows); ++r, v += g.pitch) {
          const int64_t h = (b.row + r) * s.stride_h + ph - s.pad_h;
          PixelRow row{0, s.stride_w * s.in_channels, 0, 0, g.pitch};
          if (h >= 0 && h < s.height) {
            row.before = max64(0, ceil_div(s.pad_w - pw, s.stride_w));
            const int64_t column = row.before * s.stride_w + pw - s.pad_w;
            row.count = max64(0, min64(g.pitch - row.before, ceil_div(s.width - column, s.stride_w)));
            row.from = (((b.image + i) * s.height + h) * s.width + column) * s.in_channels;
          }
          row_of(row, v);
        }
      }
      // What the taps of the last positions reach: zeros, up to the next phase or to the end of the channel.
      const int64_t end = phase + 1 == g.phases_h * g.phases_w ? stride - 32 : (phase + 1) * positions;
      if (end > v) row_of({0, 0, 0, 0, end - v}, v);
    }
  }

  void run(int64_t task, float* out) const {
    const Geometry& g = cut.g;
    const int64_t group = task / cut.splits, split = task % cut.splits;
    const int64_t first_block = g.blocks * split / cut.splits, last_block = g.blocks * (split + 1) / cut.splits;
    const int64_t taps = g.s.kernel_h * g.s.kernel_w, planes = gradient_planes(p), c_blocks = ceil_div(g.s.in_channels, 32);
    const int64_t last_band = min64(g.bands, (group + 1) * cut.bands_per_group);
    bf16* pairs = reinterpret_cast<bf16*>(base + at.gradient);
    int64_t* offsets = reinterpret_cast<int64_t*>(base + at.offsets);
    for (int64_t band = group * cut.bands_per_group; band < last_band; ++band) {
      Geometry whole = g;
      whole.splits = 1;
      const Band b = band_of(whole, band);
      const int64_t positions = gradient_positions(cut, b.images, b.rows), steps = positions / 32;
      const int64_t stride = channel_stride(cut, b.images, b.rows), plane = cut.chunk * stride;
      const int64_t at_once = taps == 1 ? steps : planes == 3 ? kGradientSteps : 3 * kGradientSteps;
      fill_source(b, positions);
      with_reads(p.gradient, [&]<Reads R>() { pack_pairs<R, T>(p.gradient, source(), positions, first_block, last_block, planes, pairs); });
      for (int64_t first = 0; first < g.s.in_channels; first += cut.chunk) {
        const int64_t last = min64(first + cut.chunk, round_up(g.s.in_channels, 16));
        with_reads(p.input, [&]<Reads R>() { pack_input<R>(b, first, last, stride, plane); });
        asm volatile("" ::: "memory");
        const bf16* panel = reinterpret_cast<const bf16*>(base + at.panel);
        for (int64_t block = first_block; block < last_block; ++block) {
          for (int64_t c = first; c < last; c += 32) {
            const bool two = c + 16 < last;
            const bf16* a = panel + (c - first) * stride;
            // A few steps at a time for all taps: what they read then stays in the first cache.
            for (int64_t from = 0; from < steps; from += at_once) {
              const int64_t count = min64(at_once, steps - from);
              for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t h = tap / g.s.kernel_w * g.s.dilation_h, w = tap % g.s.kernel_w * g.s.dilation_w;
                const int64_t shift =
                    (h % g.s.stride_h * g.phases_w + w % g.s.stride_w) * positions + h / g.s.stride_h * g.pitch + w / g.s.stride_w;
                for (int64_t i = 0; i < count; ++i) offsets[i] = shift + (from + i) * 32;
                const AmxBlock product{{a, two ? a + 16 * stride : a},
                                       stride * 2,
                                       plane,
                                       offsets,
                                       count,
                                       pairs + ((block - first_block) * steps + from) * planes * 2 * kAmxTile,
                                       out + ((block * taps + tap) * c_blocks + c / 32) * 1024,
                                       false,
                                       band == group * cut.bands_per_group && from == 0,
                                       nullptr,
                                       0};
                constexpr bool split_floats = sizeof(T) == sizeof(float);
                two ? amx_block<split_floats, true>(product) : amx_block<split_floats, false>(product);
              }
            }
          }
        }
      }
    }
  }
};

inline const char* weight_gradient_refusal(const WeightGradient& p) {
  if (p.input.shape.groups != 1) return "grouped convolutions";
  if (p.input.shape.in_channels < 16) return "fewer than 16 input channels";
  return nullptr;
}

inline int64_t weight_gradient_scratch(const WeightGradient& p) { return gradient_scratch_of(p, gradient_cut(p)).bytes; }
inline int64_t weight_gradient_tasks(const WeightGradient& p) {
  const GradientCut cut = gradient_cut(p);
  return cut.groups * cut.splits;
}
inline int64_t weight_gradient_groups(const WeightGradient& p) { return gradient_cut(p).groups; }
inline int64_t weight_gradient_elements(const WeightGradient& p) { return gradient_elements(gradient_cut(p)); }

inline void weight_gradient_run(const WeightGradient& p, int64_t task, void* scratch, float* partial) {
  const GradientCut cut = gradient_cut(p);
  configure_tiles();
  float* out = partial + task / cut.splits * gradient_elements(cut);
  if (p.input.bfloat16) {
    GradientTask<bf16>{p, cut, gradient_scratch_of(p, cut), static_cast<char*>(scratch)}.run(task, out);
  } else {
    GradientTask<float>{p, cut, gradient_scratch_of(p, cut), static_cast<char*>(scratch)}.run(task, out);
  }
  _tile_release();
}

// Where dw goes: 32 x 32 channels at a time, so that both sides stay in the first cache.
inline void weight_gradient_finish(const WeightGradient& p, const float* partial, const WeightView& dw, int64_t begin, int64_t end) {
  const GradientCut cut = gradient_cut(p);
  const ConvShape& s = cut.g.s;
  const int64_t taps = s.kernel_h * s.kernel_w, c_blocks = ceil_div(s.in_channels, 32), elements = gradient_elements(cut);
  float* out = const_cast<float*>(dw.data);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t k_last = min64(32, s.out_channels - block * 32);
    for (int64_t c_block = 0; c_block < c_blocks; ++c_block) {
      const int64_t c_last = min64(32, s.in_channels - c_block * 32);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* from = partial + ((block * taps + tap) * c_blocks + c_block) * 1024;
        for (int64_t k = 0; k < k_last; ++k) {
          float* to = out + (block * 32 + k) * dw.out + c_block * 32 * dw.in + tap * dw.tap_stride;
          for (int64_t c = 0; c < c_last; ++c) {
            float sum = 0;
            for (int64_t group = 0; group < cut.groups; ++group) sum += from[group * elements + c * 32 + k];
            to[c * dw.in] = sum;
          }
        }
      }
    }
  }
}

static const WeightGradientKernel weight_gradient = {
    "amx",
    weight_gradient_refusal,
    weight_gradient_scratch,
    weight_gradient_tasks,
    weight_gradient_groups,
    weight_gradient_elements,
    weight_gradient_run,
    weight_gradient_finish,
};

}  // namespace fastres::FASTRES_ISA

#endif  // __AMX_BF16__
