// Packing of the panel: the input rows of a band, prologue applied, padding zero, in the element format of the kernel.
#pragma once

#include "cpu_geometry.h"

namespace fastres::FASTRES_ISA {

// The element formats. write(x, p) stores kGroup neighbouring floats at p of every plane; planes lie `plane` elements apart.
struct FloatPanel {
  using Element = float;
  static constexpr int kPlanes = 1;
};

struct HalfPanel {
  using Element = bf16;
  static constexpr int kPlanes = 1;
};

// float as hi + mid + lo, exactly: 3 x 8 bits by truncation. Values that are not finite go to a fourth plane, which is touched only when
// there are any (`special`), and count as zero in the first three: a product of three parts would turn infinity into NaN.
struct SplitPanel {
  using Element = bf16;
  static constexpr int kPlanes = 3;
};

struct PanelWriter {
  int64_t plane;  // elements from one plane to the next
  void* panel;
  bool special;         // a value that is not finite was seen; plane 3 is in use
  int64_t elements;     // of a plane that are in use, for clearing plane 3
  int64_t first, last;  // the channels that are packed
};

FASTRES_INLINE HalfBits high_halves(Vec x) { return __builtin_convertvector((Bits)x >> 16, HalfBits); }

template <class Panel>
FASTRES_INLINE void write_vector(PanelWriter& w, int64_t at, Vec x) {
  if constexpr (Panel::kPlanes == 1) {
    store(static_cast<typename Panel::Element*>(w.panel) + at, x);
  } else {
    bf16* p = static_cast<bf16*>(w.panel) + at;
    const Bits exponent = (Bits)x & 0x7f800000u;
    const Mask bad = (Mask)(exponent == 0x7f800000u);
    bool any = false;
#if defined(__AVX512F__)
    any = _mm512_test_epi32_mask((__m512i)bad, (__m512i)bad) != 0;
#else
    for (int i = 0; i < kWidth; ++i) any |= bad[i] != 0;
#endif
    if (__builtin_expect(any, 0)) {
      if (!w.special) {
        w.special = true;
        __builtin_memset(static_cast<bf16*>(w.panel) + 3 * w.plane, 0, w.elements * sizeof(bf16));
      }
      store(p + 3 * w.plane, (Vec)((Bits)x & (Bits)bad));
      x = (Vec)((Bits)x & ~(Bits)bad);
    }
    const Vec hi = (Vec)((Bits)x & 0xffff0000u);
    const Vec rest = x - hi;
    const Vec mid = (Vec)((Bits)rest & 0xffff0000u);
    const Vec lo = rest - mid;
    const HalfBits parts[3] = {high_halves(hi), high_halves(mid), high_halves(lo)};
    for (int i = 0; i < 3; ++i) __builtin_memcpy(p + i * w.plane, &parts[i], sizeof parts[i]);
    if (__builtin_expect(w.special && !any, 0)) {
      const HalfBits none{};
      __builtin_memcpy(p + 3 * w.plane, &none, sizeof none);
    }
  }
}

#if defined(__AVX512BW__)
template <class Panel>
constexpr bool kSplitsPairs = Panel::kPlanes == 3;

// Two neighbouring vectors at once: one shuffle a plane takes the upper halves of 32 floats.
FASTRES_INLINE void write_pair(PanelWriter& w, int64_t at, Vec x, Vec y) {
  constexpr int kNotFinite = 0x99;  // quiet and signalling NaN, both infinities
  const unsigned bad = _mm512_fpclass_ps_mask((__m512)x, kNotFinite) | _mm512_fpclass_ps_mask((__m512)y, kNotFinite);
  if (__builtin_expect(bad != 0 || w.special, 0)) {
    write_vector<SplitPanel>(w, at, x);
    return write_vector<SplitPanel>(w, at + kWidth, y);
  }
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  bf16* p = static_cast<bf16*>(w.panel) + at;
  for (int plane = 0; plane < 3; ++plane) {
    _mm512_storeu_si512(p + plane * w.plane, _mm512_permutex2var_epi16((__m512i)x, upper, (__m512i)y));
    x -= (Vec)((Bits)x & 0xffff0000u);
    y -= (Vec)((Bits)y & 0xffff0000u);
  }
}
#else
template <class Panel>
constexpr bool kSplitsPairs = false;
FASTRES_INLINE void write_pair(PanelWriter&, int64_t, Vec, Vec) {}
#endif

// What is done to a value on its way into the panel.
enum class Reads : int { plain = 0, affine = 1, affine_relu = 2, gradient = 3 };

FASTRES_INLINE Reads reads_of(const Conv& c) {
  if (c.offset != nullptr) return Reads::gradient;
  return c.scale == nullptr ? Reads::plain : c.prologue_relu ? Reads::affine_relu : Reads::affine;
}

template <Reads R, class T, bool Partial>
FASTRES_INLINE Vec read_vector(const Conv& c, int64_t at, int64_t channel, int64_t lanes) {
  Vec x = load<Vec, Partial>(static_cast<const T*>(c.x) + at, lanes);
  if constexpr (R == Reads::affine || R == Reads::affine_relu) {
    x = fma(load<Vec, Partial>(c.scale + channel, lanes), x - load<Vec, Partial>(c.center + channel, lanes),
            load<Vec, Partial>(c.shift + channel, lanes));
    if constexpr (R == Reads::affine_relu) x = relu(x);
    x = rounded<T>(x);
  } else if constexpr (R == Reads::gradient) {
    const Vec raw = load<Vec, Partial>(static_cast<const T*>(c.raw) + at, lanes) - load<Vec, Partial>(c.mean + channel, lanes);
    x = rounded<T>(fma(load<Vec, Partial>(c.slope + channel, lanes), raw, x + load<Vec, Partial>(c.offset + channel, lanes)));
  }
  return x;
}

// Whether an element of x goes into the panel as it is.
template <class Panel, Reads R, class T>
constexpr bool kCopies = R == Reads::plain && Panel::kPlanes == 1 && sizeof(T) == sizeof(typename Panel::Element);

// Copies n elements and may write, not read, up to a vector more: what lies behind is written after.
template <class E>
FASTRES_INLINE void copy_elements(E* to, const E* from, int64_t n) {
  constexpr int64_t step = kVectorBytes / static_cast<int64_t>(sizeof(E));
  int64_t i = 0;
  for (; i + step <= n; i += step) __builtin_memcpy(to + i, from + i, kVectorBytes);
  for (; i < n; ++i) to[i] = from[i];
}

// The same, and may read up to a vector more.
template <class E>
FASTRES_INLINE void copy_loosely(E* to, const E* from, int64_t n) {
  constexpr int64_t step = kVectorBytes / static_cast<int64_t>(sizeof(E));
  for (int64_t i = 0; i < n; i += step) __builtin_memcpy(to + i, from + i, kVectorBytes);
}

template <class E>
FASTRES_INLINE void clear_loosely(E* to, int64_t n) {
  constexpr int64_t step = kVectorBytes / static_cast<int64_t>(sizeof(E));
  const Vec zero{};
  for (int64_t i = 0; i < n; i += step) __builtin_memcpy(to + i, &zero, kVectorBytes);
}

// One pixel, x at element `from`: its channels [first, last) to panel position `to`, zero-padded to `width` elements.
template <class Panel, Reads R, class T>
FASTRES_INLINE void pack_pixel(const Conv& c, PanelWriter& w, int64_t from, int64_t to, int64_t width) {
  const int64_t C = w.last - w.first;
  from += w.first;
  if constexpr (kCopies<Panel, R, T>) {
    using E = typename Panel::Element;
    E* out = static_cast<E*>(w.panel) + to;
    copy_elements(out, static_cast<const E*>(c.x) + from, C);
    return clear_loosely(out + C, width - C);
  }
  int64_t i = 0;
  if constexpr (kSplitsPairs<Panel>) {
    for (; i + 2 * kWidth <= C; i += 2 * kWidth) {
      write_pair(w, to + i, read_vector<R, T, false>(c, from + i, w.first + i, kWidth),
                 read_vector<R, T, false>(c, from + i + kWidth, w.first + i + kWidth, kWidth));
    }
  }
  for (; i + kWidth <= C; i += kWidth) write_vector<Panel>(w, to + i, read_vector<R, T, false>(c, from + i, w.first + i, kWidth));
  if (i < C) {  // whole vectors are written: the panel has slack, and what lies behind is written after
    write_vector<Panel>(w, to + i, read_vector<R, T, true>(c, from + i, w.first + i, C - i));
    i += kWidth;
  }
  for (; i < width; i += kWidth) write_vector<Panel>(w, to + i, Vec{});
}

template <class Panel>
FASTRES_INLINE void zero_pixels(PanelWriter& w, int64_t to, int64_t elements) {
  using E = typename Panel::Element;
  for (int p = 0; p < (Panel::kPlanes == 1 ? 1 : w.special ? 4 : 3); ++p) {
    __builtin_memset(static_cast<E*>(w.panel) + p * w.plane + to, 0, elements * sizeof(E));
  }
}

// One row of one phase: columns phase_w, phase_w + stride, ... of input row `row` (which may be outside: zeros).
template <class Panel, Reads R, class T>
FASTRES_INLINE void pack_row(const Conv& c, const Geometry& g, PanelWriter& w, int64_t image, int64_t row, int64_t phase_w, int64_t to) {
  const ConvShape& s = g.s;
  if (row < 0 || row >= s.height) return zero_pixels<Panel>(w, to, g.pitch * g.pixel);
  const int64_t begin = (image * s.height + row) * s.width;
  for (int64_t q = 0; q < g.pitch; ++q) {
    const int64_t column = q * s.stride_w + phase_w - s.pad_w;
    if (column < 0 || column >= s.width) {
      zero_pixels<Panel>(w, to + q * g.pixel, g.pixel);
    } else {
      pack_pixel<Panel, R, T>(c, w, (begin + column) * s.in_channels, to + q * g.pixel, g.run);
    }
  }
}

template <class Panel, Reads R, class T>
void pack_band(const Conv& c, const Geometry& g, const Band& b, PanelWriter& w) {
  const ConvShape& s = g.s;
  for (int64_t ph = 0; ph < g.phases_h; ++ph) {
    for (int64_t pw = 0; pw < g.phases_w; ++pw) {
      int64_t to = (ph * g.phases_w + pw) * phase_positions(g, b.images, b.rows) * g.pixel;
      for (int64_t i = 0; i < b.images; ++i) {
        for (int64_t row = 0; row < panel_rows(g, b.rows); ++row, to += g.pitch * g.pixel) {
          pack_row<Panel, R, T>(c, g, w, b.image + i, (g.first_row + b.row + row) * s.stride_h + ph - s.pad_h, pw, to);
        }
      }
    }
  }
  // Taps of the last positions reach past the end: zeros, so that junk stays finite and plane 3 stays exact.
  const int64_t used = g.phases_h * g.phases_w * phase_positions(g, b.images, b.rows) * g.pixel;
  zero_pixels<Panel>(w, used, min64(w.plane - used - kWidth, tail_elements(g)));
}

// One row of x with its padding, all pixels as neighbours: [(W + 2 pad)*C] elements, zeros up to `width`.
template <class Panel, Reads R, class T>
FASTRES_INLINE void pack_whole_row(const Conv& c, PanelWriter& w, int64_t image, int64_t row, int64_t to, int64_t width) {
  const ConvShape& s = c.shape;
  const int64_t C = s.in_channels, n = s.width * C, at = to + s.pad_w * C;
  zero_pixels<Panel>(w, to, width);
  if (row < 0 || row >= s.height) return;
  const int64_t begin = (image * s.height + row) * s.width;
  if constexpr (R != Reads::plain) {
    for (int64_t q = 0; q < s.width; ++q) pack_pixel<Panel, R, T>(c, w, (begin + q) * C, at + q * C, 0);
  } else if constexpr (kCopies<Panel, R, T>) {
    copy_elements(static_cast<typename Panel::Element*>(w.panel) + at, static_cast<const typename Panel::Element*>(c.x) + begin * C, n);
  } else {
    int64_t k = 0;
    if constexpr (kSplitsPairs<Panel>) {
      for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
        write_pair(w, at + k, read_vector<R, T, false>(c, begin * C + k, 0, kWidth),
                   read_vector<R, T, false>(c, begin * C + k + kWidth, 0, kWidth));
      }
    }
    for (; k + kWidth <= n; k += kWidth) write_vector<Panel>(w, at + k, read_vector<R, T, false>(c, begin * C + k, 0, kWidth));
    if (k < n) write_vector<Panel>(w, at + k, read_vector<R, T, true>(c, begin * C + k, 0, n - k));
  }
}

// Packing with overlapping positions: whole rows, by phases.
template <class Panel, Reads R, class T>
void pack_rows(const Conv& c, const Geometry& g, const Band& b, PanelWriter& w) {
  const ConvShape& s = g.s;
  const int64_t width = g.pitch * g.pixel;
  int64_t to = 0;
  for (int64_t ph = 0; ph < g.phases_h; ++ph) {
    for (int64_t i = 0; i < b.images; ++i) {
      for (int64_t row = 0; row < panel_rows(g, b.rows); ++row, to += width) {
        pack_whole_row<Panel, R, T>(c, w, b.image + i, (g.first_row + b.row + row) * s.stride_h + ph - s.pad_h, to, width);
      }
    }
  }
  zero_pixels<Panel>(w, to, min64(w.plane - to, tail_elements(g)));
  if constexpr (sizeof(typename Panel::Element) == sizeof(bf16) && Panel::kPlanes == 1) {
    const uint16_t* p = static_cast<const uint16_t*>(w.panel);
    unsigned found = 0;
    for (int64_t i = 0; i < to; ++i) found |= (p[i] & 0x7f80u) == 0x7f80u;
    w.special = found != 0;
  }
}

// Packing by columns. The row buffer holds the band's input rows with their padding, [rows, (W + 2 pad)*C]; then each output position
// gets its R pieces of S*C neighbouring elements (or R*S pieces of C where taps are dilated).
#if defined(__AVX512BW__)
// Pieces of at most one vector: row after row of taps, so that each is a plain stream of loads and stores. What is written past a piece
// lies under the next one or under the zeros at the end.
template <class E>
FASTRES_INLINE void copy_pieces(const ConvShape& s, const E* from, int64_t width, int64_t piece, int64_t length, int64_t pixel, E* to) {
  constexpr int64_t step = kVectorBytes / static_cast<int64_t>(sizeof(E));
  const int64_t stride = s.stride_w * s.in_channels;
  for (int64_t r = 0; r < s.kernel_h; ++r) {
    const E* row = from + r * s.dilation_h * width;
    E* out = to + r * piece;
    for (int64_t q = 0; q < s.out_width; ++q) __builtin_memcpy(out + q * pixel, row + q * stride, kVectorBytes);
  }
  for (int64_t n = pixel - length, at = length; n > 0; n -= step, at += step) {
    const int64_t lanes = min64(n, step);
    for (int64_t q = 0; q < s.out_width; ++q) {
      E* out = to + q * pixel + at;
      if constexpr (sizeof(E) == 2) {
        _mm512_mask_storeu_epi16(out, static_cast<__mmask32>((uint64_t{1} << lanes) - 1), _mm512_setzero_si512());
      } else {
        _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << lanes) - 1), _mm512_setzero_ps());
      }
    }
  }
}
#endif

template <class Panel, Reads R, class T>
void pack_columns(const Conv& c, const Geometry& g, const Band& b, PanelWriter& w) {
  using E = typename Panel::Element;
  const ConvShape& s = g.s;
  const int64_t C = s.in_channels, width = row_buffer_width(g), rows = row_buffer_rows(g, b.rows);
  const int64_t piece = s.dilation_w == 1 ? s.kernel_w * C : C, pieces = s.dilation_w == 1 ? 1 : s.kernel_w;
  const int64_t length = s.kernel_h * s.kernel_w * C;
  for (int64_t i = 0; i < b.images; ++i) {
    // The row buffer lies behind the planes and has the planes' distance itself.
    PanelWriter buffer{rows * width, static_cast<E*>(w.panel) + (Panel::kPlanes == 1 ? 1 : 4) * w.plane, w.special, rows * width, 0, C};
    for (int64_t row = 0; row < rows; ++row) {
      pack_whole_row<Panel, R, T>(c, buffer, b.image + i, (g.first_row + b.row) * s.stride_h + row - s.pad_h, row * width, width);
    }
    if (buffer.special && !w.special) {
      w.special = true;
      __builtin_memset(static_cast<E*>(w.panel) + 3 * w.plane, 0, w.elements * sizeof(E));
    }
    for (int plane = 0; plane < (Panel::kPlanes == 1 ? 1 : w.special ? 4 : 3); ++plane) {
      const E* from = static_cast<const E*>(buffer.panel) + plane * buffer.plane;
      E* to = static_cast<E*>(w.panel) + plane * w.plane + i * b.rows * s.out_width * g.pixel;
      for (int64_t p = 0; p < b.rows; ++p) {
#if defined(__AVX512BW__)
        // The last piece's vector must end inside the pixel, or it would spill into the next one, which is written already.
        if (pieces == 1 && piece * static_cast<int64_t>(sizeof(E)) <= kVectorBytes &&
            length - piece + kVectorBytes / static_cast<int64_t>(sizeof(E)) <= g.pixel) {
          copy_pieces(s, from + p * s.stride_h * width, width, piece, length, g.pixel, to);
          to += s.out_width * g.pixel;
          continue;
        }
#endif
        for (int64_t q = 0; q < s.out_width; ++q, to += g.pixel) {
          E* out = to;
          for (int64_t r = 0; r < s.kernel_h; ++r) {
            const E* row = from + (p * s.stride_h + r * s.dilation_h) * width + q * s.stride_w * C;
            for (int64_t k = 0; k < pieces; ++k, out += piece) copy_loosely(out, row + k * s.dilation_w * C, piece);
          }
          clear_loosely(to + length, g.pixel - length);
        }
      }
    }
  }
}

template <class Panel, Reads R, class T>
void pack_either(const Conv& c, const Geometry& g, const Band& b, PanelWriter& w) {
  if (g.overlap) return pack_rows<Panel, R, T>(c, g, b, w);
  g.columns ? pack_columns<Panel, R, T>(c, g, b, w) : pack_band<Panel, R, T>(c, g, b, w);
}

// Fills the panel of a band.
template <class Panel, class T>
void pack_panel(const Conv& c, const Geometry& g, const Band& b, PanelWriter& w) {
  switch (reads_of(c)) {
    case Reads::plain: return pack_either<Panel, Reads::plain, T>(c, g, b, w);
    case Reads::affine: return pack_either<Panel, Reads::affine, T>(c, g, b, w);
    case Reads::affine_relu: return pack_either<Panel, Reads::affine_relu, T>(c, g, b, w);
    case Reads::gradient: return pack_either<Panel, Reads::gradient, T>(c, g, b, w);
  }
}

}  // namespace fastres::FASTRES_ISA
