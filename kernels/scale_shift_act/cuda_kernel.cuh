// scale_shift_act in CUDA, forward and backward: __global__ kernels and launch(problem, stream). No torch header; the same source is
// compiled by g++ and run thread by thread in tests/emulation, which is why launches go through FASTRES_LAUNCH.
//
//   z = scale*(y - center) + shift + R,   out = relu(z) or z;   R = nothing | residual | res_scale*(residual - res_center) + res_shift
//
// Backward: dz = grad where z > 0, grad_y = scale*dz, grad_R = [res_scale*]dz, and the sums of dz, of dz*(y-center) and of
// dz*(residual-res_center). The masked pass writes dz alone, for readers who scale it themselves.
//
// Bytes, for E elements of s bytes: forward 2Es (3Es with a residual), backward 3Es (5Es), masked 3Es (4Es), plus the partial sums: S*C
// floats for each of the `parts` that a part of the rows gets, written and read once.
//
// Work: channels_last is a matrix [R = N*H*W, C]. A block is kPointThreads threads: `across` threads side by side, each holding V
// neighbouring channels and their coefficients in registers, and kPointThreads/across rows below each other; a thread goes down its column.
// Contiguous forward is one long vector of planes; contiguous backward gives every warp one piece of one plane. The sums: per thread in
// float, over the block's rows through shared memory, over the parts by a second kernel in double. No atomics, and the cut depends on the
// shape only: the same bits on every run and every device.
#pragma once

#include "../common/cuda_device.cuh"
#include "cuda_problem.h"

namespace fastres::cuda {

// Coefficients of V lanes: V neighbouring channels, or one channel in every lane.
template <int V>
struct Coefficients {
  float scale[V], center[V], shift[V];
  FASTRES_DEVICE void read(const Affine& a, int64_t channel, bool same) {
    for (int v = 0; v < V; ++v) {
      const int64_t c = channel + (same ? 0 : v);
      scale[v] = a.scale[c];
      center[v] = a.center[c];
      shift[v] = a.shift[c];
    }
  }
  // fmaf in forward and backward alike: both must see the same bits, or their ReLU masks disagree.
  FASTRES_DEVICE float operator()(float x, int v) const { return fmaf(scale[v], x - center[v], shift[v]); }
};

template <Residual K, int V>
FASTRES_DEVICE float pre_activation(const Coefficients<V>& main, const Coefficients<V>& res, float y, float residual, int v) {
  float z = main(y, v);
  if constexpr (K == Residual::plain) z += residual;
  if constexpr (K == Residual::affine) z += res(residual, v);
  return z;
}

template <class T, int V, Residual K>
FASTRES_DEVICE void forward_at(const PointProblem& p, const Coefficients<V>& main, const Coefficients<V>& res, int64_t at) {
  float y[V], r[V] = {}, out[V];
  load(static_cast<const T*>(p.y) + at, y);
  if constexpr (K != Residual::none) load(static_cast<const T*>(p.residual) + at, r);
  for (int v = 0; v < V; ++v) {
    const float z = pre_activation<K>(main, res, y[v], r[v], v);
    out[v] = p.relu && z <= 0.0f ? 0.0f : z;  // a NaN is not <= 0 and stays
  }
  store(static_cast<T*>(p.out) + at, out);
}

// channels_last. Grid: (columns of `across` vectors, parts of the rows).
template <class T, int V, Residual K>
__global__ void __launch_bounds__(kPointThreads, kPointBlocks) forward_rows(PointProblem p, int across) {
  const int64_t rows = p.images * p.plane, column = threadIdx.x % across, down = kPointThreads / across;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * across + column) * V;
  if (channel >= p.channels) return;
  Coefficients<V> main, res{};
  main.read(p.main, channel, false);
  if constexpr (K == Residual::affine) res.read(p.res, channel, false);
  for (int64_t row = blockIdx.y * down + threadIdx.x / across; row < rows; row += gridDim.y * down) {
    forward_at<T, V, K>(p, main, res, row * p.channels + channel);
  }
}

// Contiguous. Grid-stride over vectors; V divides H*W, so a vector has one channel.
template <class T, int V, Residual K>
__global__ void __launch_bounds__(kPointThreads, kPointBlocks) forward_planes(PointProblem p, int) {
  const int64_t total = p.images * p.channels * p.plane, step = static_cast<int64_t>(gridDim.x) * kPointThreads * V;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kPointThreads + threadIdx.x) * V; at < total; at += step) {
    Coefficients<V> main, res{};
    const int64_t channel = at / p.plane % p.channels;
    main.read(p.main, channel, true);
    if constexpr (K == Residual::affine) res.read(p.res, channel, true);
    forward_at<T, V, K>(p, main, res, at);
  }
}

template <Residual K>
constexpr int kSums = K == Residual::affine ? 3 : 2;

template <class T, int V, Residual K, bool Masked>
FASTRES_DEVICE void backward_at(const PointProblem& p, const Coefficients<V>& main, const Coefficients<V>& res, int64_t at,
                                float (&sum)[kSums<K>][V]) {
  float y[V], g[V], r[V] = {}, out[V], out_r[V];
  load(static_cast<const T*>(p.y) + at, y);
  load(static_cast<const T*>(p.grad) + at, g);
  // A plain residual matters to the mask only.
  if (K == Residual::affine || (K == Residual::plain && p.relu)) load(static_cast<const T*>(p.residual) + at, r);
  for (int v = 0; v < V; ++v) {
    const float dz = !p.relu || pre_activation<K>(main, res, y[v], r[v], v) > 0.0f ? g[v] : 0.0f;
    sum[0][v] = fmaf(dz, y[v] - main.center[v], sum[0][v]);
    sum[1][v] += dz;
    if constexpr (K == Residual::affine) sum[2][v] = fmaf(dz, r[v] - res.center[v], sum[2][v]);
    out[v] = Masked ? dz : main.scale[v] * dz;
    out_r[v] = K == Residual::affine ? res.scale[v] * dz : dz;
  }
  store(static_cast<T*>(p.grad_y) + at, out);
  if constexpr (K != Residual::none && !Masked) {
    if (p.grad_residual != nullptr) store(static_cast<T*>(p.grad_residual) + at, out_r);
  }
}

// channels_last, first stage: partial[blockIdx.y] for the block's channels.
template <class T, int V, Residual K, bool Masked>
__global__ void __launch_bounds__(kPointThreads, kPointBlocks) backward_rows(PointProblem p, int across) {
  constexpr int S = kSums<K>;
  __shared__ float shared[S][V][kPointThreads];
  const int64_t rows = p.images * p.plane;
  const int column = threadIdx.x % across, down = kPointThreads / across, first = threadIdx.x / across;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * across + column) * V;
  float sum[S][V] = {};
  if (channel < p.channels) {
    Coefficients<V> main, res{};
    main.read(p.main, channel, false);
    if constexpr (K == Residual::affine) res.read(p.res, channel, false);
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * down + first; row < rows; row += static_cast<int64_t>(gridDim.y) * down) {
      backward_at<T, V, K, Masked>(p, main, res, row * p.channels + channel, sum);
    }
  }
  for (int s = 0; s < S; ++s) {
    for (int v = 0; v < V; ++v) shared[s][v][threadIdx.x] = sum[s][v];
  }
  __syncthreads();
  if (first != 0 || channel >= p.channels) return;
  for (int s = 0; s < S; ++s) {
    for (int v = 0; v < V; ++v) {
      float total = 0;
      for (int d = 0; d < down; ++d) total += shared[s][v][d * across + column];
      p.partial[(static_cast<int64_t>(blockIdx.y) * S + s) * p.channels + channel + v] = total;
    }
  }
}

// Contiguous, first stage: a warp takes one piece of one plane. Part = image*pieces + piece.
template <class T, int V, Residual K, bool Masked>
__global__ void __launch_bounds__(kPointThreads, kPointBlocks) backward_planes(PointProblem p, int) {
  constexpr int S = kSums<K>;
  __shared__ float shared[S][kPointThreads];
  const int64_t pieces = (p.plane + kPointPiece - 1) / kPointPiece, items = p.images * pieces * p.channels;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kPointWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t part = item / p.channels, channel = item % p.channels;
  float sum[S][V] = {};
  if (item < items) {
    Coefficients<V> main, res{};
    main.read(p.main, channel, true);
    if constexpr (K == Residual::affine) res.read(p.res, channel, true);
    const int64_t base = (part / pieces * p.channels + channel) * p.plane, start = part % pieces * kPointPiece;
    const int64_t end = start + kPointPiece < p.plane ? start + kPointPiece : p.plane;
    for (int64_t i = start + lane * V; i < end; i += kWarp * V) backward_at<T, V, K, Masked>(p, main, res, base + i, sum);
  }
  for (int s = 0; s < S; ++s) {
    float total = 0;
    for (int v = 0; v < V; ++v) total += sum[s][v];
    shared[s][threadIdx.x] = total;
  }
  __syncthreads();
  if (lane != 0 || item >= items) return;
  for (int s = 0; s < S; ++s) {
    float total = 0;
    for (int l = 0; l < kWarp; ++l) total += shared[s][threadIdx.x + l];
    p.partial[(part * S + s) * p.channels + channel] = total;
  }
}

// Second stage: adds the parts up in double. Grid: (groups of 32 channels, sums); thread (channel, slice of the parts).
template <int S>
__global__ void __launch_bounds__(kPointThreads, kPointBlocks) add_parts(PointProblem p, int64_t parts) {
  __shared__ double shared[kPointWarps][kWarp];
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp, s = blockIdx.y;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double total = 0;
  if (channel < p.channels) {
    for (int64_t part = slice; part < parts; part += kPointWarps) total += p.partial[(part * S + s) * p.channels + channel];
  }
  shared[slice][lane] = total;
  __syncthreads();
  if (slice != 0 || channel >= p.channels) return;
  total = 0;
  for (int i = 0; i < kPointWarps; ++i) total += shared[i][lane];
  p.sum_out[s][channel] = static_cast<float>(total);
}

// ---- host ------------------------------------------------------------------------------------------------------------------------------
template <class T, int V, Residual K>
void launch_forward(const PointProblem& p, void* stream) {
  if (p.planes) {
    const int64_t blocks = clamp(ceil_div(p.images * p.channels * p.plane, kPointThreads * V * 4), 1, kMaxGrid);
    FASTRES_LAUNCH((forward_planes<T, V, K>), dim3(static_cast<unsigned>(blocks)), dim3(kPointThreads), 0, stream, p, 0);
  } else {
    const int n = across(p, V);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.channels, static_cast<int64_t>(n) * V)), static_cast<unsigned>(parts(p)));
    FASTRES_LAUNCH((forward_rows<T, V, K>), grid, dim3(kPointThreads), 0, stream, p, n);
  }
}

template <class T, int V, Residual K, bool Masked>
void launch_backward(const PointProblem& p, void* stream) {
  if (p.planes) {
    const int64_t blocks = ceil_div(parts(p) * p.channels, kPointWarps);
    FASTRES_LAUNCH((backward_planes<T, V, K, Masked>), dim3(static_cast<unsigned>(blocks)), dim3(kPointThreads), 0, stream, p, 0);
  } else {
    const int n = across(p, V);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.channels, static_cast<int64_t>(n) * V)), static_cast<unsigned>(parts(p)));
    FASTRES_LAUNCH((backward_rows<T, V, K, Masked>), grid, dim3(kPointThreads), 0, stream, p, n);
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.channels, kWarp)), static_cast<unsigned>(sums(p)));
  FASTRES_LAUNCH((add_parts<kSums<K>>), grid, dim3(kPointThreads), 0, stream, p, parts(p));
}

template <class T, int V, Pass P, Residual K>
void launch_pass(const PointProblem& p, void* stream) {
  if constexpr (P == Pass::forward) {
    launch_forward<T, V, K>(p, stream);
  } else {
    launch_backward<T, V, K, P == Pass::masked>(p, stream);
  }
}

template <class T, int V, Pass P>
void launch_kind(const PointProblem& p, void* stream) {
  switch (p.residual_kind) {
    case Residual::none: return launch_pass<T, V, P, Residual::none>(p, stream);
    case Residual::plain: return launch_pass<T, V, P, Residual::plain>(p, stream);
    case Residual::affine: return launch_pass<T, V, P, Residual::affine>(p, stream);
  }
}

template <class T, Pass P>
void launch_width(const PointProblem& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  vector_length(p) == V ? launch_kind<T, V, P>(p, stream) : launch_kind<T, 1, P>(p, stream);
}

// Queues the kernels of one pass on `stream` (cudaStream_t). The problem has elements; the caller checks for launch errors.
template <Pass P>
void launch(const PointProblem& p, void* stream) {
  switch (p.type) {
    case Type::float32: return launch_width<float, P>(p, stream);
    case Type::float16: return launch_width<Half, P>(p, stream);
    case Type::bfloat16: return launch_width<BFloat, P>(p, stream);
  }
}

}  // namespace fastres::cuda
