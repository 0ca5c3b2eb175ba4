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

template <bool Planes, bool Partial>
FASTRES_INLINE Coefficients<Vec> coefficients(const Affine& a, const Block& b, int k) {
  return {channel_load<Planes, Partial>(a.scale, b, k), channel_load<Planes, Partial>(a.center, b, k),
          channel_load<Planes, Partial>(a.shift, b, k)};
}

// The pre-activation z, from y and the residual.
template <Residual Kind>
FASTRES_INLINE Vec pre_activation(const Coefficients<Vec>& main, const Coefficients<Vec>& res, Vec y, Vec residual) {
  Vec z = main(y);
  if constexpr (Kind == Residual::plain) z += residual;
  if constexpr (Kind == Residual::affine) z += res(residual);
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
    Coefficients<Vec> main[K], res[K];
    for (int k = 0; k < K; ++k) {
      main[k] = coefficients<Planes, Partial>(p.main, b, k);
      if constexpr (Kind == Residual::affine) res[k] = coefficients<Planes, Partial>(p.res, b, k);
    }
    for (int64_t r = 0; r < b.rows; ++r, y += b.stride, residual += b.stride, out += b.stride) {
      for (int k = 0; k < K; ++k) {
        const Vec yk = load<Vec, Partial>(y + k * kWidth, b.lanes);
        Vec rk{};
        if constexpr (Kind != Residual::none) rk = load<Vec, Partial>(residual + k * kWidth, b.lanes);
        const Vec z = pre_activation<Kind>(main[k], res[k], yk, rk);
        store<Partial>(out + k * kWidth, Relu ? relu(z) : z, b.lanes);
      }
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
  Sums<Planes, kSums> sums;

  template <int K, bool Partial>
  __attribute__((always_inline)) void block(const Block& b) {
    const T* grad = static_cast<const T*>(p.grad) + b.offset;
    const T* y = static_cast<const T*>(p.y) + b.offset;
    const T* residual = static_cast<const T*>(p.residual) + (kReadResidual ? b.offset : 0);
    T* grad_y = static_cast<T*>(p.grad_y) + b.offset;
    T* grad_residual = static_cast<T*>(p.grad_residual) + (WantResidual ? b.offset : 0);
    Coefficients<Vec> main[K], res[K];
    Vec acc[kSums][K];
    for (int k = 0; k < K; ++k) {
      main[k] = coefficients<Planes, Partial>(p.main, b, k);
      if constexpr (Kind == Residual::affine) res[k] = coefficients<Planes, Partial>(p.res, b, k);
    }
    sums.template open<K, Partial>(b, acc);
    for (int64_t r = 0; r < b.rows; ++r) {
      for (int k = 0; k < K; ++k) {
        const int64_t at = r * b.stride + k * kWidth;
        const Vec yk = load<Vec, Partial>(y + at, b.lanes);
        Vec dz = load<Vec, Partial>(grad + at, b.lanes), rk{};
        if constexpr (kReadResidual) rk = load<Vec, Partial>(residual + at, b.lanes);
        if constexpr (Relu) dz = where_positive(pre_activation<Kind>(main[k], res[k], yk, rk), dz);
        acc[0][k] = fma(dz, yk - main[k].center, acc[0][k]);
        acc[1][k] += dz;
        store<Partial>(grad_y + at, main[k].scale * dz, b.lanes);
        if constexpr (Kind == Residual::affine) acc[2][k] = fma(dz, rk - res[k].center, acc[2][k]);
        if constexpr (WantResidual) {
          store<Partial>(grad_residual + at, Kind == Residual::affine ? res[k].scale * dz : dz, b.lanes);
        }
      }
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
    Body body{p, Sums<Planes, Body::kSums>::begin(p.partial + part * Body::kSums * C, C)};
    walk<Planes>(p.shape, item, body);
    body.sums.end(Planes ? item % C : 0);
  }
}

}  // namespace fastres::FASTRES_ISA
