// batch_norm_act in CUDA: training BatchNorm, addition and ReLU in one cooperative launch each way, for maps that fit on chip. No torch
// header; launches go through FASTRES_LAUNCH_COOPERATIVE. Maths: README.md in this folder.
//
// Two kernels in sequence would read y twice: once for the statistics, once to apply them. Here a block keeps its tile in registers and
// shared memory while all blocks of its channels meet at a barrier. Bytes, for E elements of s bytes: forward 2Es (3Es with a residual),
// backward 3Es (5Es with a residual under a ReLU), plus 2*C floats for each part of the rows.
//
// Work: a block is kNormThreads threads, `across` of them side by side with V neighbouring channels each, the others below. Thread t has
// rows t/across + i*(kNormThreads/across) of its part, i = 0, 1, ...: the first ones in registers, the rest in shared memory.
// No float atomics: sums are added in an order that depends on the plan only, so one shape has the same bits in every run on one device.
#pragma once

#include "../common/cuda_barrier.cuh"
#include "cuda_problem.h"

namespace fastres::cuda {

// Where a thread stands in its block's tile, and the block's shared memory.
template <class T, int V>
struct NormTile {
  int column, first, down, width;  // width: channels of the block
  int group_channel, channel;      // the block's and the thread's first channel
  bool inside;                     // whether the thread has channels
  int rows;                        // of this part
  int64_t base;                    // element of the part's first row at `channel`
  int64_t step;                    // elements between the rows of a thread
  float* scratch;
  float* vectors;  // [4][width]
  Pack<T, V>* kept;

  FASTRES_DEVICE NormTile(const NormProblem& p, unsigned char* shared) {
    const NormPlan& plan = p.plan;
    column = threadIdx.x % plan.across;
    first = threadIdx.x / plan.across;
    down = kNormThreads / plan.across;
    width = plan.across * V;
    group_channel = static_cast<int>(blockIdx.x) * width;
    channel = group_channel + column * V;
    inside = channel < p.channels;
    const int64_t begin = blockIdx.y * plan.part_rows, left = p.rows - begin;
    rows = static_cast<int>(left < plan.part_rows ? left : plan.part_rows);
    base = (begin + first) * p.channels + channel;
    step = static_cast<int64_t>(down) * p.channels;
    scratch = reinterpret_cast<float*>(shared);
    vectors = scratch + kNormScratch<V>;
    const int fixed = (kNormScratch<V> + 4 * width) * static_cast<int>(sizeof(float));
    kept = reinterpret_cast<Pack<T, V>*>(shared + (fixed + 127) / 128 * 128) + threadIdx.x;
  }
  FASTRES_DEVICE bool has(int item) const { return inside && first + item * down < rows; }
  FASTRES_DEVICE int64_t at(int item) const { return base + item * step; }
};

// Nothing of a pack but its own registers lives on from here: else the compiler keeps its elements as floats, twice the registers.
template <class T, int V>
FASTRES_DEVICE void only_packed([[maybe_unused]] Pack<T, V>& pack) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 2 && V > 1) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(&pack);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) asm volatile("" : "+r"(words[i]));
  }
#endif
}

// A pack of a map into shared memory, asynchronously where its size allows.
template <class T, int V>
FASTRES_DEVICE void keep(Pack<T, V>* shared, const T* global) {
  if constexpr (sizeof(Pack<T, V>) >= 4) {
    copy_async<sizeof(Pack<T, V>)>(shared, global, true);
  } else {
    *shared = *reinterpret_cast<const Pack<T, V>*>(global);
  }
}

// sums[c] for every channel c of the block: that of `value` over its threads. All threads call it; thread c knows sums[c], the others
// after a barrier, which the next use of the scratch space needs as well.
template <class T, int V>
FASTRES_DEVICE void add_block(const NormTile<T, V>& t, const float (&value)[V], float* sums) {
  constexpr int kRow = kNormThreads + 1;  // padded: neighbouring channels lie in different banks
  const int c = threadIdx.x % t.width, slice = threadIdx.x / t.width, slices = kNormThreads / t.width;
#pragma unroll
  for (int v = 0; v < V; ++v) t.scratch[v * kRow + threadIdx.x] = value[v];
  __syncthreads();
  float total = 0;
  const float* row = t.scratch + c % V * kRow + c / V;
  for (int d = slice; d < t.down; d += slices) total += row[d * (t.width / V)];
  __syncthreads();
  t.scratch[threadIdx.x] = total;
  __syncthreads();
  if (slice == 0) {
    for (int s = 1; s < slices; ++s) total += t.scratch[s * t.width + c];
    sums[c] = total;
  }
}

// The sum over all parts, for this thread's channel c of the block, of f(part), in double and in a fixed order; in the first
// `width` threads. All threads call it; the scratch space is free after a barrier.
template <class T, int V, class F>
FASTRES_DEVICE double add_parts(const NormTile<T, V>& t, int parts, F f) {
  double* const scratch = reinterpret_cast<double*>(t.scratch);
  const int c = threadIdx.x % t.width, slice = threadIdx.x / t.width, slices = kNormThreads / t.width;
  double total = 0;
  for (int part = slice; part < parts; part += slices) total += f(part, c);
  scratch[threadIdx.x] = total;
  __syncthreads();
  if (slice == 0) {
    for (int s = 1; s < slices; ++s) total += scratch[s * t.width + c];
  }
  return total;
}

// The one place where a variance becomes a scale: forward and backward must see the same bits, or their ReLU masks disagree.
FASTRES_DEVICE float inverse_deviation(float var, float eps) { return 1.0f / sqrtf(var + eps); }

template <class T, int V>
struct NormCoefficients {
  float scale[V], center[V], shift[V];
  FASTRES_DEVICE float operator()(float y, int v) const { return fmaf(scale[v], y - center[v], shift[v]); }
};

// `load(item, slot)` of kAtOnce items before `use(item, slot)` of any: loads that are under way side by side.
constexpr int kAtOnce = 2;
template <class T, int V, class Load, class Use>
FASTRES_DEVICE void batch(const NormTile<T, V>& t, int item, int end, Load load, Use use) {
#pragma unroll
  for (int slot = 0; slot < kAtOnce; ++slot) {
    if (item + slot < end && t.has(item + slot)) load(item + slot, slot);
  }
#pragma unroll
  for (int slot = 0; slot < kAtOnce; ++slot) {
    if (item + slot < end && t.has(item + slot)) use(item + slot, slot);
  }
}

template <class T, int V, bool HasResidual>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks) batch_norm_forward(NormProblem p) {
  constexpr int K = kForwardItems;
  FASTRES_DYNAMIC_SHARED(shared);
  const NormTile<T, V> t(p, shared);
  const T* const y = static_cast<const T*>(p.y);
  const int in_shared = p.plan.shared_items, rows_all = static_cast<int>(p.rows), part = blockIdx.y, parts = p.plan.parts;
  Pack<T, V> held[K];
  for (int s = 0; s < in_shared; ++s) {
    if (t.has(K + s)) keep(t.kept + s * kNormThreads, y + t.at(K + s));
  }
  commit_copies();
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (t.has(i)) held[i] = *reinterpret_cast<const Pack<T, V>*>(y + t.at(i));
  }
  wait_copies<0>();
  const auto each = [&](auto use) {  // use(pack, item) of the thread's packs
#pragma unroll
    for (int i = 0; i < K; ++i) {
      only_packed(held[i]);
      if (t.has(i)) use(held[i]);
    }
    for (int s = 0; s < in_shared; ++s) {
      if (t.has(K + s)) use(t.kept[s * kNormThreads]);
    }
  };

  // The part's mean, and its sum of squares about a mean that needn't be exact: what it is off by is summed as well and taken back.
  float sum[V] = {}, mid[V], off[V] = {}, square[V] = {};
  each([&](const Pack<T, V>& pack) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += to_float(pack.x[v]);
  });
  float* const about = t.vectors;
  add_block(t, sum, about);
  __syncthreads();
  const float count = static_cast<float>(t.rows);
#pragma unroll
  for (int v = 0; v < V; ++v) mid[v] = about[t.column * V + v] / count;
  each([&](const Pack<T, V>& pack) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float d = to_float(pack.x[v]) - mid[v];
      off[v] += d;
      square[v] = fmaf(d, d, square[v]);
    }
  });
  add_block(t, off, about + t.width);
  __syncthreads();
  add_block(t, square, about + 2 * t.width);
  const int own = threadIdx.x, own_channel = t.group_channel + own;
  const bool speaks = own < t.width && own_channel < p.channels;  // one thread for each channel of the block
  if (speaks) {
    const float wrong = about[t.width + own];
    p.partial[(static_cast<int64_t>(part) * 2) * p.channels + own_channel] = about[own] / count + wrong / count;
    p.partial[(static_cast<int64_t>(part) * 2 + 1) * p.channels + own_channel] = about[2 * t.width + own] - wrong * wrong / count;
  }
  wait_for_blocks(p.arrived + blockIdx.x, static_cast<unsigned>(parts), part == 0);

  // All parts by Chan's formula: n*mean = sum of n_i*mean_i, M2 = sum of M2_i + n_i*(mean_i - mean)^2.
  const auto of_part = [&](int i, int which, int c) {
    return t.group_channel + c < p.channels ? p.partial[(static_cast<int64_t>(i) * 2 + which) * p.channels + t.group_channel + c] : 0.0f;
  };
  const auto rows_of = [&](int i) {
    const int64_t left = p.rows - i * p.plan.part_rows;
    return static_cast<double>(left < p.plan.part_rows ? left : p.plan.part_rows);
  };
  const double total = add_parts(t, parts, [&](int i, int c) { return rows_of(i) * of_part(i, 0, c); });
  if (speaks) about[own] = static_cast<float>(total / rows_all);
  __syncthreads();
  const double squares = add_parts(t, parts, [&](int i, int c) {
    const double d = static_cast<double>(of_part(i, 0, c)) - about[c];
    return of_part(i, 1, c) + rows_of(i) * d * d;
  });
  if (speaks) {
    const float var = squares < 0.0 ? 0.0f : static_cast<float>(squares / rows_all);  // a NaN stays
    if (part == 0) {
      p.mean[own_channel] = about[own];
      p.var[own_channel] = var;
    }
    about[t.width + own] = p.weight[own_channel] * inverse_deviation(var, p.eps);
    about[2 * t.width + own] = p.bias[own_channel];
  }
  __syncthreads();

  NormCoefficients<T, V> affine;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int c = t.column * V + v;
    affine.center[v] = about[c];
    affine.scale[v] = about[t.width + c];
    affine.shift[v] = about[2 * t.width + c];
  }
  Pack<T, V> residual[kAtOnce];
  const auto load = [&](int item, int slot) {
    if constexpr (HasResidual) residual[slot] = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.residual) + t.at(item));
  };
  const auto finish = [&](const Pack<T, V>& pack, int item, int slot) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float z = affine(to_float(pack.x[v]), v);
      if constexpr (HasResidual) z += to_float(residual[slot].x[v]);
      out[v] = p.relu && z <= 0.0f ? 0.0f : z;  // a NaN is not <= 0 and stays
    }
    store(static_cast<T*>(p.out) + t.at(item), out);
  };
#pragma unroll
  for (int i = 0; i < K; ++i) only_packed(held[i]);
#pragma unroll
  for (int i = 0; i < K; i += kAtOnce) batch(t, i, K, load, [&](int item, int slot) { finish(held[item], item, slot); });
  for (int i = K; i < K + in_shared; i += kAtOnce) {
    batch(t, i, K + in_shared, load, [&](int item, int slot) { finish(t.kept[(item - K) * kNormThreads], item, slot); });
  }
}

// grad_y = scale*(dz - mean of dz - (y - mean)*(mean of dz*(y - mean))/(var + eps)), grad_residual = dz = grad where z > 0.
// dz is grad or 0, so it is kept and written as it came.
template <class T, int V, bool HasResidual>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks) batch_norm_backward(NormProblem p) {
  constexpr int K = kBackwardItems;
  FASTRES_DYNAMIC_SHARED(shared);
  const NormTile<T, V> t(p, shared);
  const T *const y = static_cast<const T*>(p.y), *const grad = static_cast<const T*>(p.grad);
  const int in_shared = p.plan.shared_items, part = blockIdx.y, parts = p.plan.parts;
  const auto kept_y = [&](int item) -> Pack<T, V>& { return t.kept[(item - K) * 2 * kNormThreads]; };
  const auto kept_dz = [&](int item) -> Pack<T, V>& { return t.kept[((item - K) * 2 + 1) * kNormThreads]; };
  for (int i = K; i < K + in_shared; ++i) {
    if (!t.has(i)) continue;
    keep(&kept_y(i), y + t.at(i));
    keep(&kept_dz(i), grad + t.at(i));
  }
  commit_copies();
  NormCoefficients<T, V> affine{};
  if (t.inside) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = t.channel + v;
      affine.center[v] = p.mean[c];
      affine.scale[v] = p.weight[c] * inverse_deviation(p.var[c], p.eps);
      affine.shift[v] = p.bias[c];
    }
  }
  Pack<T, V> held_y[K], held_dz[K], residual[kAtOnce];
  float sum[V] = {}, dot[V] = {};
  const auto load_residual = [&](int item, int slot) {
    if constexpr (HasResidual) residual[slot] = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.residual) + t.at(item));
  };
  const auto load = [&](int item, int slot) {
    held_y[item] = *reinterpret_cast<const Pack<T, V>*>(y + t.at(item));
    held_dz[item] = *reinterpret_cast<const Pack<T, V>*>(grad + t.at(item));
    load_residual(item, slot);
  };
  const auto mask = [&](const Pack<T, V>& value, Pack<T, V>& dz, int item, int slot) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float x = to_float(value.x[v]);
      if (p.relu) {
        float z = affine(x, v);
        if constexpr (HasResidual) z += to_float(residual[slot].x[v]);
        if (!(z > 0.0f)) dz.x[v] = T{};
      }
      sum[v] += to_float(dz.x[v]);
      dot[v] = fmaf(to_float(dz.x[v]), x - affine.center[v], dot[v]);
    }
    if (p.grad_residual != nullptr) *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(p.grad_residual) + t.at(item)) = dz;
  };
#pragma unroll
  for (int i = 0; i < K; i += kAtOnce) {
    batch(t, i, K, load, [&](int item, int slot) { mask(held_y[item], held_dz[item], item, slot); });
  }
  wait_copies<0>();
  for (int i = K; i < K + in_shared; i += kAtOnce) {
    batch(t, i, K + in_shared, load_residual, [&](int item, int slot) { mask(kept_y(item), kept_dz(item), item, slot); });
  }

  float* const means = t.vectors;
  add_block(t, sum, means);
  __syncthreads();
  add_block(t, dot, means + t.width);
  const int own = threadIdx.x, own_channel = t.group_channel + own;
  const bool speaks = own < t.width && own_channel < p.channels;
  if (speaks) {
    p.partial[(static_cast<int64_t>(part) * 2) * p.channels + own_channel] = means[own];
    p.partial[(static_cast<int64_t>(part) * 2 + 1) * p.channels + own_channel] = means[t.width + own];
  }
  wait_for_blocks(p.arrived + blockIdx.x, static_cast<unsigned>(parts), part == 0);
  const auto of_parts = [&](int which) {
    return add_parts(t, parts, [&](int i, int c) {
      return t.group_channel + c < p.channels ? p.partial[(static_cast<int64_t>(i) * 2 + which) * p.channels + t.group_channel + c] : 0.0f;
    });
  };
  const double total = of_parts(0);
  __syncthreads();
  const double against = of_parts(1);
  if (speaks) {
    const float inverse = inverse_deviation(p.var[own_channel], p.eps);
    if (part == 0) {
      p.grad_bias[own_channel] = static_cast<float>(total);
      p.grad_weight[own_channel] = static_cast<float>(against) * inverse;
    }
    means[own] = static_cast<float>(total / static_cast<double>(p.rows));
    means[t.width + own] = static_cast<float>(against / static_cast<double>(p.rows)) * (inverse * inverse);
  }
  __syncthreads();

  const auto finish = [&](const Pack<T, V>& value, const Pack<T, V>& dz, int item) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = t.column * V + v;
      out[v] = affine.scale[v] * fmaf(-means[t.width + c], to_float(value.x[v]) - affine.center[v], to_float(dz.x[v]) - means[c]);
    }
    store(static_cast<T*>(p.grad_y) + t.at(item), out);
  };
#pragma unroll
  for (int i = 0; i < K; ++i) {
    only_packed(held_y[i]);
    only_packed(held_dz[i]);
    if (t.has(i)) finish(held_y[i], held_dz[i], i);
  }
  for (int i = K; i < K + in_shared; ++i) {
    if (t.has(i)) finish(kept_y(i), kept_dz(i), i);
  }
}

// ---- host ------------------------------------------------------------------------------------------------------------------------------
template <class T, int V, bool Backward>
void launch_norm(const NormProblem& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.groups), static_cast<unsigned>(p.plan.parts)), block(kNormThreads);
  const auto bytes = static_cast<size_t>(p.plan.shared_bytes);
  if constexpr (Backward) {
    if (p.residual != nullptr) {
      FASTRES_LAUNCH_COOPERATIVE((batch_norm_backward<T, V, true>), grid, block, bytes, stream, p);
    } else {
      FASTRES_LAUNCH_COOPERATIVE((batch_norm_backward<T, V, false>), grid, block, bytes, stream, p);
    }
  } else {
    if (p.residual != nullptr) {
      FASTRES_LAUNCH_COOPERATIVE((batch_norm_forward<T, V, true>), grid, block, bytes, stream, p);
    } else {
      FASTRES_LAUNCH_COOPERATIVE((batch_norm_forward<T, V, false>), grid, block, bytes, stream, p);
    }
  }
}

template <class T, bool Backward>
void launch_norm(const NormProblem& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  p.plan.vector == V ? launch_norm<T, V, Backward>(p, stream) : launch_norm<T, 1, Backward>(p, stream);
}

// Queues the kernel on `stream` (cudaStream_t). The problem has its plan; the caller checks for launch errors.
template <bool Backward>
void launch_norm(const NormProblem& p, void* stream) {
  switch (p.type) {
    case Type::float32: return launch_norm<float, Backward>(p, stream);
    case Type::float16: return launch_norm<Half, Backward>(p, stream);
    case Type::bfloat16: return launch_norm<BFloat, Backward>(p, stream);
  }
}

}  // namespace fastres::cuda
