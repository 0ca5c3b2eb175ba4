// Max pooling of act(scale*(y - center) + shift) on the CPU, without ever writing the activated map; its backward; and the gather that
// builds the pooled map again from y and the saved 8-bit positions.
//
// Bytes, for E input and P output elements of s bytes: forward reads Es and writes P(s+1); gather reads Es + P and writes Ps; backward
// reads Es + P(s+1) and writes Es.
//
// channels_last works on Vec (neighbouring channels), contiguous on single elements: same templates, same arithmetic. Forward and
// gather: an item is one row of the output (of one image, and in a contiguous tensor of one channel), which it owns. Backward gathers per
// input position, so nothing is scattered and the sums are deterministic: an item is one part of y (cpu_shape.h) and owns its grad_y
// and its row of partial sums.
#pragma once

#include "../common/cpu_problems.h"
#include "../common/cpu_walk.h"
#include "../scale_shift_act/cpu_scale_shift_act.h"

namespace fastres::FASTRES_ISA {

// Positions inside a window as floats (at most 255, so exact): comparing and selecting them then needs no second vector type.
FASTRES_INLINE void load_index(const uint8_t* p, Vec* out) {
  ByteBits bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  *out = __builtin_convertvector(__builtin_convertvector(bytes, Mask), Vec);
}
FASTRES_INLINE void load_index(const uint8_t* p, float* out) { *out = *p; }
FASTRES_INLINE void store_index(uint8_t* p, Vec x) {
  const ByteBits bytes = __builtin_convertvector(__builtin_convertvector(x, Mask), ByteBits);
  __builtin_memcpy(p, &bytes, sizeof bytes);
}
FASTRES_INLINE void store_index(uint8_t* p, float x) { *p = static_cast<uint8_t>(x); }

template <class V, bool Partial>
FASTRES_INLINE V load_index(const uint8_t* p, int64_t lanes) {
  V out;
  if constexpr (Partial) {
    uint8_t buffer[kLanes<V>] = {};
    for (int64_t i = 0; i < lanes; ++i) buffer[i] = p[i];
    load_index(buffer, &out);
  } else {
    load_index(p, &out);
  }
  return out;
}
template <bool Partial, class V>
FASTRES_INLINE void store_index(uint8_t* p, V x, int64_t lanes) {
  if constexpr (Partial) {
    uint8_t buffer[kLanes<V>];
    store_index(buffer, x);
    for (int64_t i = 0; i < lanes; ++i) p[i] = buffer[i];
  } else {
    store_index(p, x);
  }
}

template <class V, bool Partial>
FASTRES_INLINE Coefficients<V> pool_coefficients(const Affine& a, int64_t channel, int64_t lanes) {
  return {load<V, Partial>(a.scale + channel, lanes), load<V, Partial>(a.center + channel, lanes),
          load<V, Partial>(a.shift + channel, lanes)};
}

// Where one channel group of one image lies: element (h, w) of it is at offset + (h*width + w)*step.
struct Field {
  int64_t offset, step, channel, lanes;
};

// The part of a window that is inside the map: rows [h0, h1) and columns [w0, w1), the window starting at (top, left).
struct Inside {
  int64_t top, left, h0, h1, w0, w1;
};

FASTRES_INLINE Inside inside(const Shape& s, const Window& w, int64_t oh, int64_t ow) {
  const int64_t top = oh * w.stride - w.padding, left = ow * w.stride - w.padding;
  return {top, left, max64(0, top), min64(s.height, top + w.kernel), max64(0, left), min64(s.width, left + w.kernel)};
}

// First maximum wins; a NaN beats every number, and a later NaN an earlier one (torch's max_pool2d).
template <class V, bool Partial, class T, bool Relu>
FASTRES_INLINE void pool_one(const ScaleShiftActPool& p, const Coefficients<V>& c, const Field& f, const Inside& in, T* out,
                             uint8_t* index) {
  V best = splat<V>(-__builtin_inff());
  V where = splat<V>(static_cast<float>((in.h0 - in.top) * p.window.kernel + in.w0 - in.left));
  for (int64_t h = in.h0; h < in.h1; ++h) {
    const T* y = static_cast<const T*>(p.y) + f.offset + (h * p.shape.width + in.w0) * f.step;
    float position = static_cast<float>((h - in.top) * p.window.kernel + in.w0 - in.left);
    for (int64_t w = in.w0; w < in.w1; ++w, y += f.step, position += 1.0f) {
      V z = c(load<V, Partial>(y, f.lanes));
      if constexpr (Relu) z = relu(z);
      z = rounded<T>(z);  // what the unfused pool would read: which of two equal elements wins depends on it
      const auto better = (z > best) | (z != z);
      where = better ? splat<V>(position) : where;
      best = better ? z : best;
    }
  }
  store<Partial>(out, best, f.lanes);
  store_index<Partial>(index, where, f.lanes);
}

// The activated element that the saved position names; NaN where the position names none, so a wrong index cannot pass unseen.
template <class V, bool Partial, class T, bool Relu>
FASTRES_INLINE void gather_one(const ScaleShiftActPool& p, const Coefficients<V>& c, const Field& f, const Inside& in, T* out,
                               const uint8_t* index) {
  const V where = load_index<V, Partial>(index, f.lanes);
  V found = splat<V>(__builtin_nanf(""));
  for (int64_t h = in.h0; h < in.h1; ++h) {
    const T* y = static_cast<const T*>(p.y) + f.offset + (h * p.shape.width + in.w0) * f.step;
    float position = static_cast<float>((h - in.top) * p.window.kernel + in.w0 - in.left);
    for (int64_t w = in.w0; w < in.w1; ++w, y += f.step, position += 1.0f) {
      V z = c(load<V, Partial>(y, f.lanes));
      if constexpr (Relu) z = relu(z);
      found = (where == splat<V>(position)) ? z : found;
    }
  }
  store<Partial>(out, found, f.lanes);
}

// One row of the output for one channel group.
template <class V, bool Partial, bool Gather, class T, bool Relu>
FASTRES_INLINE void pool_row(const ScaleShiftActPool& p, const Field& f, int64_t oh, int64_t out_offset) {
  const Coefficients<V> c = pool_coefficients<V, Partial>(p.main, f.channel, f.lanes);
  for (int64_t ow = 0; ow < p.window.out_width; ++ow) {
    const Inside in = inside(p.shape, p.window, oh, ow);
    const int64_t at = out_offset + ow * f.step;
    T* out = static_cast<T*>(p.out) + at;
    if constexpr (Gather) {
      gather_one<V, Partial, T, Relu>(p, c, f, in, out, p.index + at);
    } else {
      pool_one<V, Partial, T, Relu>(p, c, f, in, out, p.index + at);
    }
  }
}

// Items: N*OH (channels_last) or N*C*OH (contiguous).
template <bool Gather, class T, bool Planes, bool Relu>
void scale_shift_act_pool(const ScaleShiftActPool& p, int64_t begin, int64_t end) {
  const int64_t C = p.shape.channels, OH = p.window.out_height, OW = p.window.out_width, plane = plane_of(p.shape);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t oh = item % OH, image = item / OH;  // contiguous: image counts planes
    if constexpr (Planes) {
      pool_row<float, false, Gather, T, Relu>(p, {image * plane, 1, image % C, 1}, oh, (image * OH + oh) * OW);
    } else {
      const int64_t y = image * plane * C, out = (image * OH + oh) * OW * C;
      int64_t c = 0;
      for (; c + kWidth <= C; c += kWidth) pool_row<Vec, false, Gather, T, Relu>(p, {y + c, C, c, kWidth}, oh, out + c);
      if (c < C) pool_row<Vec, true, Gather, T, Relu>(p, {y + c, C, c, C - c}, oh, out + c);
    }
  }
}

// The windows [first, last) that cover one input coordinate x: o*stride - padding <= x < o*stride - padding + kernel. Stepping to x+1
// costs no division.
struct Cover {
  int64_t stride, outputs, enter, enter_left, leave, leave_left;

  FASTRES_INLINE Cover at(const Window& w, int64_t outputs, int64_t x) {
    const int64_t in = x + w.padding, out = in - w.kernel;  // window o is entered at in = o*stride and left at out = o*stride
    const int64_t before = out >= 0 ? out / w.stride : -1;  // the last window that was left
    return {w.stride, outputs, in / w.stride, w.stride - in % w.stride, before, (before + 1) * w.stride - out};
  }
  __attribute__((always_inline)) void step() {
    if (--enter_left == 0) ++enter, enter_left = stride;
    if (--leave_left == 0) ++leave, leave_left = stride;
  }
  __attribute__((always_inline)) int64_t first() const { return leave + 1; }
  __attribute__((always_inline)) int64_t last() const { return min64(outputs, enter + 1); }
};

// `count` input elements side by side, from (h, w) on, for one channel group: the gradients of the windows that chose each, through the
// ReLU, into grad_y and the two sums. `grad` and `index` start at out_offset for this image (and plane).
template <class V, bool Partial, class T, bool Relu>
FASTRES_INLINE void pool_back_run(const ScaleShiftActPoolBackward& p, const Coefficients<V>& c, const Field& f, int64_t out_offset,
                                  int64_t h, int64_t w, int64_t count, V* sum_scale, V* sum_shift) {
  const Window& win = p.window;
  const Cover rows = Cover::at(win, win.out_height, h);
  Cover columns = Cover::at(win, win.out_width, w);
  const T* grad = static_cast<const T*>(p.grad) + out_offset;
  const uint8_t* index = p.index + out_offset;
  const int64_t at = f.offset + (h * p.shape.width + w) * f.step;
  const T* y = static_cast<const T*>(p.y) + at;
  T* grad_y = static_cast<T*>(p.grad_y) + at;
  V total_scale = *sum_scale, total_shift = *sum_shift;
  for (int64_t i = 0; i < count; ++i, columns.step(), y += f.step, grad_y += f.step) {
    V dz{};
    for (int64_t oh = rows.first(); oh < rows.last(); ++oh) {
      for (int64_t ow = columns.first(); ow < columns.last(); ++ow) {
        const int64_t from = (oh * win.out_width + ow) * f.step;
        const int64_t position = (h + win.padding - oh * win.stride) * win.kernel + w + i + win.padding - ow * win.stride;
        const V where = load_index<V, Partial>(index + from, f.lanes);
        dz += (where == splat<V>(static_cast<float>(position))) ? load<V, Partial>(grad + from, f.lanes) : V{};
      }
    }
    const V x = load<V, Partial>(y, f.lanes);
    if constexpr (Relu) dz = where_positive(c(x), dz);
    total_scale = fma(dz, x - c.center, total_scale);
    total_shift += dz;
    store<Partial>(grad_y, c.scale * dz, f.lanes);
  }
  *sum_scale = total_scale;
  *sum_shift = total_shift;
}

template <bool Partial, class T, bool Relu>
FASTRES_INLINE void pool_back_channels(const ScaleShiftActPoolBackward& p, float* sums, const Field& f, int64_t out_offset, int64_t h,
                                       int64_t w, int64_t count) {
  const Coefficients<Vec> c = pool_coefficients<Vec, Partial>(p.main, f.channel, f.lanes);
  float* scale = sums + f.channel;
  float* shift = sums + p.shape.channels + f.channel;
  Vec sum_scale = load<Vec, Partial>(scale, f.lanes), sum_shift = load<Vec, Partial>(shift, f.lanes);
  pool_back_run<Vec, Partial, T, Relu>(p, c, f, out_offset, h, w, count, &sum_scale, &sum_shift);
  store<Partial>(scale, sum_scale, f.lanes);
  store<Partial>(shift, sum_shift, f.lanes);
}

// Items: items_of(shape of y). A part is walked in runs that stay inside one row of the image.
template <class T, bool Planes, bool Relu>
void scale_shift_act_pool_backward(const ScaleShiftActPoolBackward& p, int64_t begin, int64_t end) {
  const Shape& s = p.shape;
  const int64_t C = s.channels, plane = plane_of(s), out_plane = p.window.out_height * p.window.out_width;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = Planes ? item / C : item, n = positions_of_part(s, part);
    float* sums = p.partial + part * 2 * C;
    if constexpr (Planes) {
      const int64_t channel = item % C, image = part / pieces_of(s), start = part % pieces_of(s) * kPieceElements;
      const int64_t offset = image * C + channel;
      const Field f{offset * plane, 1, channel, 1};
      const Coefficients<float> c = pool_coefficients<float, false>(p.main, channel, 1);
      double total_scale = 0, total_shift = 0;
      for (int64_t i = start, run; i < start + n; i += run) {
        float sum_scale = 0, sum_shift = 0;
        run = min64(start + n - i, s.width - i % s.width);
        pool_back_run<float, false, T, Relu>(p, c, f, offset * out_plane, i / s.width, i % s.width, run, &sum_scale, &sum_shift);
        total_scale += sum_scale;
        total_shift += sum_shift;
      }
      sums[channel] = static_cast<float>(total_scale);
      sums[C + channel] = static_cast<float>(total_shift);
    } else {
      for (int64_t i = 0; i < 2 * C; ++i) sums[i] = 0.0f;
      const int64_t first = part * rows_per_part(s);
      for (int64_t row = first, run; row < first + n; row += run) {
        const int64_t image = row / plane, h = row % plane / s.width, w = row % s.width, y = image * plane * C, out = image * out_plane * C;
        run = min64(first + n - row, s.width - w);
        int64_t c = 0;
        for (; c + kWidth <= C; c += kWidth) pool_back_channels<false, T, Relu>(p, sums, {y + c, C, c, kWidth}, out + c, h, w, run);
        if (c < C) pool_back_channels<true, T, Relu>(p, sums, {y + c, C, c, C - c}, out + c, h, w, run);
      }
    }
  }
}

}  // namespace fastres::FASTRES_ISA
