// scale_shift_act on the CPU, forward and backward.
//
//   z   = scale*(y - center) + shift + R        R = nothing | residual | res_scale*(residual - res_center) + res_shift
//   out = relu(z) or z
//
// Bytes, for E elements of s bytes: forward reads y (and the residual) and writes out: 2Es (3Es). Backward reads grad and y (and the
// residual where the mask or a sum needs it) and writes grad_y (and grad_residual): 3Es (5Es). Nothing else is stored: the
// pre-activation is computed again, with the same instructions, so forward and backward agree on every ReLU.
//
// An item is one part of the tensor (cpu_shape.h). It owns its elements of every output and its own row of partial sums; two items
// share nothing, so any thread may run any item.
#pragma once

#include "../common/cpu_problems.h"
#include "../common/cpu_walk.h"

namespace fastres::FASTRES_ISA {

template <class V>
struct Coefficients {
  V scale, center, shift;
  __attribute__((always_inline)) V operator()(V x) const { return fma(scale, x - center, shift); }
};

// Those of a block's K vectors of T.
template <int K>
struct BlockCoefficients {
  Vec scale[K], center[K], shift[K];

  template <class T, bool Planes, bool Partial>
  __attribute__((always_inline)) void read(const Affine& a, const Block& b) {
    channel_load<T, Planes, Partial>(a.scale, b, scale);
    channel_load<T, Planes, Partial>(a.center, b, center);
    channel_load<T, Planes, Partial>(a.shift, b, shift);
  }
  __attribute__((always_inline)) Vec operator()(Vec x, int k) const { return Coefficients<Vec>{scale[k], center[k], shift[k]}(x); }
};

// The pre-activation z, from y and the residual.
template <Residual Kind, int K>
FASTRES_INLINE Vec pre_activation(const BlockCoefficients<K>& main, const BlockCoefficients<K>& res, Vec y, Vec residual, int k) {
  Vec z = main(y, k);
  if constexpr (Kind == Residual::plain) z += residual;
  if constexpr (Kind == Residual::affine) z += res(residual, k);
  return z;
}

template <class T, bool Planes, Residual Kind, bool Relu>
struct Forward {
  const ScaleShiftAct& p;

  template <int K, bool Partial>
  __attribute__((always_inline)) void block(const Block& b) const {
    const T* y = static_cast<const T*>(p.y) + b.offset;
    const T* residual = static_cast<const T*>(p.residual) + (Kind == Residual::none ? 0 : b.offset);
    T* out = static_cast<T*>(p.out) + b.offset;
    BlockCoefficients<K> main, res;
    main.template read<T, Planes, Partial>(p.main, b);
    if constexpr (Kind == Residual::affine) res.template read<T, Planes, Partial>(p.res, b);
    for (int64_t r = 0; r < b.rows; ++r, y += b.stride, residual += b.stride, out += b.stride) {
      Vec yk[K], rk[K] = {}, result[K];
      load_vectors<Partial>(y, b.lanes, yk);
      if constexpr (Kind != Residual::none) load_vectors<Partial>(residual, b.lanes, rk);
      for (int k = 0; k < K; ++k) {
        const Vec z = pre_activation<Kind>(main, res, yk[k], rk[k], k);
        result[k] = Relu ? relu(z) : z;
      }
      store_vectors<Partial>(out, result, b.lanes);
    }
  }
};

template <class T, bool Planes, Residual Kind, bool Relu>
void scale_shift_act(const ScaleShiftAct& p, int64_t begin, int64_t end) {
  Forward<T, Planes, Kind, Relu> body{p};
  for (int64_t item = begin; item < end; ++item) walk<Planes>(p.shape, item, body);
}

template <class T, bool Planes, Residual Kind, bool Relu, bool WantResidual>
struct Backward {
  static constexpr int kSums = Kind == Residual::affine ? 3 : 2;
  static constexpr bool kReadResidual = Kind == Residual::affine || (Kind == Residual::plain && Relu);
  const ScaleShiftActBackward& p;
  Sums<T, Planes, kSums> sums;

  template <int K, bool Partial>
  __attribute__((always_inline)) void block(const Block& b) {
    const T* grad = static_cast<const T*>(p.grad) + b.offset;
    const T* y = static_cast<const T*>(p.y) + b.offset;
    const T* residual = static_cast<const T*>(p.residual) + (kReadResidual ? b.offset : 0);
    T* grad_y = static_cast<T*>(p.grad_y) + b.offset;
    T* grad_residual = static_cast<T*>(p.grad_residual) + (WantResidual ? b.offset : 0);
    BlockCoefficients<K> main, res;
    Vec acc[kSums][K];
    main.template read<T, Planes, Partial>(p.main, b);
    if constexpr (Kind == Residual::affine) res.template read<T, Planes, Partial>(p.res, b);
    sums.template open<K, Partial>(b, acc);
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t at = r * b.stride;
      Vec yk[K], dz[K], rk[K] = {}, out[K], out_residual[K];
      load_vectors<Partial>(y + at, b.lanes, yk);
      load_vectors<Partial>(grad + at, b.lanes, dz);
      if constexpr (kReadResidual) load_vectors<Partial>(residual + at, b.lanes, rk);
      for (int k = 0; k < K; ++k) {
        if constexpr (Relu) dz[k] = where_positive(pre_activation<Kind>(main, res, yk[k], rk[k], k), dz[k]);
        acc[0][k] = fma(dz[k], yk[k] - main.center[k], acc[0][k]);
        acc[1][k] += dz[k];
        out[k] = main.scale[k] * dz[k];
        if constexpr (Kind == Residual::affine) {
          acc[2][k] = fma(dz[k], rk[k] - res.center[k], acc[2][k]);
          out_residual[k] = res.scale[k] * dz[k];
        }
      }
      store_vectors<Partial>(grad_y + at, out, b.lanes);
      if constexpr (WantResidual && Kind == Residual::affine) store_vectors<Partial>(grad_residual + at, out_residual, b.lanes);
      if constexpr (WantResidual && Kind == Residual::plain) store_vectors<Partial>(grad_residual + at, dz, b.lanes);
    }
    sums.template close<K, Partial>(b, acc);
  }
};

template <class T, bool Planes, Residual Kind, bool Relu, bool WantResidual>
void scale_shift_act_backward(const ScaleShiftActBackward& p, int64_t begin, int64_t end) {
  using Body = Backward<T, Planes, Kind, Relu, WantResidual>;
  const int64_t C = p.shape.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = Planes ? item / C : item;
    Body body{p, Sums<T, Planes, Body::kSums>::begin(p.partial + part * Body::kSums * C, C)};
    walk<Planes>(p.shape, item, body);
    body.sums.end(Planes ? item % C : 0);
  }
}

}  // namespace fastres::FASTRES_ISA
