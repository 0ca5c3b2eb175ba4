// The Winograd transforms of one tile: what surrounds the products in cpu_winograd.h.
//
// A convolution of m outputs with 3 taps is a product of polynomials: evaluate both at n = m + 2 points (one of them infinity), multiply
// point by point, interpolate. In two dimensions this is done for rows and columns, so a tile of m x m outputs costs n x n products a
// channel where the definition takes 9 m x m.
//
// WinogradTile4 has the points 0, +-a, +-b, infinity with a = sqrt(1/2), b = sqrt(2): a*b = 1 saves multiplications and the error is half
// that of the usual +-1, +-2. Tiles of 3 and 2 outputs use the subsets without -b, without +-b. The weights stay those of the full set: the
// factors (p + b), (p^2 - b^2) of each point p, by which their denominators are too large, go into the transform of the input.
#pragma once

#include "cpu_epilogue.h"

namespace fastres::FASTRES_ISA {

struct WinogradTile4 {
  static constexpr int kOut = 4, kIn = 6;
};
struct WinogradTile2 {  // points 0, 1, -1, infinity
  static constexpr int kOut = 2, kIn = 4;
};

constexpr double kPointA = 0.70710678118654752440, kPointB = 1.41421356237309504880;
constexpr double kA2 = 0.5, kB2 = 2.0;

// Where point i of a tile with N inputs is among the points of the full tile.
template <class F, int N>
constexpr int winograd_point(int i) {
  return i == N - 1 ? F::kIn - 1 : i;
}

// One row of weights at point i of the full set, over the product of differences to the other points.
template <class F>
FASTRES_INLINE double winograd_weight(int i, double g0, double g1, double g2) {
  if (i == F::kIn - 1) return g2;
  if constexpr (F::kOut == 2) return i == 0 ? g0 : 0.5 * (g0 + g2 + (i == 1 ? g1 : -g1));
  if (i == 0) return g0;
  const double p = i < 3 ? kPointA : kPointB, p2 = i < 3 ? kA2 : kB2, other = i < 3 ? kB2 : kA2;
  return (g0 + (i % 2 == 1 ? p : -p) * g1 + p2 * g2) / (2 * p2 * (p2 - other));
}

// c*x + y with a constant.
FASTRES_INLINE Vec axpy(double c, Vec x, Vec y) { return fma(splat<Vec>(static_cast<float>(c)), x, y); }
FASTRES_INLINE Vec times(double c, Vec x) { return splat<Vec>(static_cast<float>(c)) * x; }

// N inputs to N points.
template <class F, int N>
FASTRES_INLINE void input_points(const Vec (&d)[N], Vec (&out)[N]) {
  constexpr double a = kPointA, b = kPointB;
  if constexpr (F::kOut == 2) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[3] - d[1];
  } else if constexpr (N == 6) {
    out[0] = axpy(-(kA2 + kB2), d[2], d[4] + d[0]);
    const Vec even_a = axpy(-kB2, d[2], d[4]), odd_a = axpy(-kB2, d[1], d[3]);
    out[1] = axpy(a, odd_a, even_a);
    out[2] = axpy(-a, odd_a, even_a);
    const Vec even_b = axpy(-kA2, d[2], d[4]), odd_b = axpy(-kA2, d[1], d[3]);
    out[3] = axpy(b, odd_b, even_b);
    out[4] = axpy(-b, odd_b, even_b);
    out[5] = axpy(-(kA2 + kB2), d[3], d[5] + d[1]);
  } else if constexpr (N == 5) {  // without -b: the point p is scaled by p + b
    out[0] = axpy(b, d[3], axpy(-kB2, d[2], axpy(-kA2 * b, d[1], d[0])));
    out[1] = axpy(a + b, d[3], axpy((a + b) * (a - b), d[2], times(-(a + b) * a * b, d[1])));
    out[2] = axpy(b - a, d[3], axpy((b - a) * (-a - b), d[2], times((b - a) * a * b, d[1])));
    out[3] = axpy(2 * b, d[3], times(-2 * b * kA2, d[1]));
    out[4] = axpy(-b, d[3], axpy(-kA2, d[2], axpy(kA2 * b, d[1], d[4])));
  } else {  // without +-b: the point p is scaled by p^2 - b^2
    out[0] = axpy(-kB2, d[2], d[0]);
    const Vec even = times(kA2 - kB2, d[2]), odd = times(a * (kA2 - kB2), d[1]);
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = axpy(-kA2, d[1], d[3]);
  }
}

// N points to N - 2 outputs.
template <class F, int N>
FASTRES_INLINE void output_points(const Vec (&m)[N], Vec (&y)[N - 2]) {
  constexpr double a = kPointA, b = kPointB;
  const Vec sum = m[1] + m[2], difference = m[1] - m[2];
  y[0] = m[0] + sum;
  if constexpr (F::kOut == 2) {
    y[1] = difference + m[3];
  } else if constexpr (N == 6) {
    const Vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] += sum_b;
    y[1] = axpy(a, difference, times(b, difference_b));
    y[2] = axpy(kA2, sum, times(kB2, sum_b));
    y[3] = axpy(a * kA2, difference, axpy(b * kB2, difference_b, m[5]));
  } else if constexpr (N == 5) {
    y[0] += m[3];
    y[1] = axpy(a, difference, times(b, m[3]));
    y[2] = axpy(kA2, sum, axpy(kB2, m[3], m[4]));
  } else {
    y[1] = axpy(a, difference, m[3]);
  }
}

// Transformed inputs as the products read them.
template <class T>
FASTRES_INLINE void put_point(bf16* p, Vec x) {
  store_rounded(p, x);
}
template <class T>
FASTRES_INLINE void put_point(float* p, Vec x) {
  store(p, rounded<T>(x));
}

// Inputs of a tile of R x S inputs to its points: channels [first, first + vectors * kWidth) of each pixel cells[r * S + s] to
// v + (point r * kIn + point s) * stride.
template <class F, int R, int S, class T, class E>
__attribute__((noinline)) void input_tile(const T* const* cells, int64_t first, int64_t vectors, E* v, int64_t stride) {
  for (int64_t i = first; i < first + vectors * kWidth; i += kWidth, v += kWidth) {
    Vec columns[S][R];
#pragma GCC unroll 6
    for (int s = 0; s < S; ++s) {
      Vec x[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) load(cells[r * S + s] + i, &x[r]);
      input_points<F, R>(x, columns[s]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      Vec x[S], out[S];
#pragma GCC unroll 6
      for (int s = 0; s < S; ++s) x[s] = columns[s][r];
      input_points<F, S>(x, out);
#pragma GCC unroll 6
      for (int s = 0; s < S; ++s) {
        put_point<T>(v + (winograd_point<F, R>(r) * F::kIn + winograd_point<F, S>(s)) * stride, out[s]);
      }
    }
  }
}

// Where the outputs of a tile go: the first `rows` x `cols` of them, `channels` of the block.
template <class T>
struct WinogradOut {
  T* y;               // [rows, cols, channels] with the distances below
  const T* residual;  // the same, or null
  int64_t row, pixel;
  int rows, cols;
  int64_t channels;
  const Vec* bias;  // [2]
  float low;        // of the clamp: 0 for a ReLU, else -infinity
};

template <class T>
__attribute__((noinline)) void finish_partly(T* y, const T* residual, Vec x, float low, int64_t lanes) {
  if (residual != nullptr) x += load<Vec, true>(residual, lanes);
  x = (x < low) ? splat<Vec>(low) : x;
  store<true>(y, x, lanes);
}

// Sums of a tile at its points, m + point * stride, [2 * kWidth], to outputs.
template <class F, int R, int S, class T>
__attribute__((noinline)) void output_tile(const float* m, int64_t stride, const WinogradOut<T>& out) {
  const Vec low = splat<Vec>(out.low);
  for (int64_t k = 0; k < 2 * kWidth && k < out.channels; k += kWidth) {
    Vec columns[S][R - 2];
#pragma GCC unroll 6
    for (int s = 0; s < S; ++s) {
      Vec x[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        load(m + (winograd_point<F, R>(r) * F::kIn + winograd_point<F, S>(s)) * stride + k, &x[r]);
      }
      output_points<F, R>(x, columns[s]);
    }
    const Vec bias = out.bias[k / kWidth];
    const int64_t lanes = out.channels - k;
#pragma GCC unroll 4
    for (int r = 0; r < R - 2; ++r) {
      if (r >= out.rows) break;
      Vec x[S], y[S - 2];
#pragma GCC unroll 6
      for (int s = 0; s < S; ++s) x[s] = columns[s][r];
      output_points<F, S>(x, y);
#pragma GCC unroll 4
      for (int s = 0; s < S - 2; ++s) {
        if (s >= out.cols) break;
        const int64_t at = r * out.row + s * out.pixel + k;
        const T* residual = out.residual == nullptr ? nullptr : out.residual + at;
        Vec sum = y[s] + bias;
        if (lanes < kWidth) {
          finish_partly(out.y + at, residual, sum, out.low, lanes);
          continue;
        }
        if (residual != nullptr) sum += load<Vec, false>(residual, kWidth);
        store_rounded(out.y + at, (sum < low) ? low : sum);  // keeps NaN
      }
    }
  }
}

// Calls f with the inputs of a tile's rows and columns as template arguments.
template <class F, class G>
FASTRES_INLINE void with_sides(int rows, int cols, G&& f) {
  if constexpr (F::kOut == 2) {
    f.template operator()<4, 4>();
  } else {
    switch (rows * 8 + cols) {
      case 6 * 8 + 6: return f.template operator()<6, 6>();
      case 6 * 8 + 5: return f.template operator()<6, 5>();
      case 6 * 8 + 4: return f.template operator()<6, 4>();
      case 5 * 8 + 6: return f.template operator()<5, 6>();
      case 5 * 8 + 5: return f.template operator()<5, 5>();
      case 5 * 8 + 4: return f.template operator()<5, 4>();
      case 4 * 8 + 6: return f.template operator()<4, 6>();
      case 4 * 8 + 5: return f.template operator()<4, 5>();
      default: return f.template operator()<4, 4>();
    }
  }
}

}  // namespace fastres::FASTRES_ISA
