// More sample kernels: sums through static shared memory, through shuffles, and over the blocks of a cooperative launch.
#pragma once

#include "plants.h"

namespace samples {

using namespace fastres::cuda;

struct Sums {
  Plant plant;
  int64_t rows, columns;
  const float* x;     // [rows, columns]
  float* out;         // [rows]
  float* partial;     // [blocks]: grid_sum only
  unsigned* arrived;  // one word, 0 before: grid_sum only
};

constexpr int kSumThreads = 128;

FASTRES_DEVICE float column_sum(const Sums& p, int64_t row) {
  float sum = 0;
  for (int64_t c = threadIdx.x; c < p.columns + (p.plant == kGuardOffByOne); c += kSumThreads) sum += p.x[row * p.columns + c];
  return sum;
}

// out[row]: a block a row, halving what is left to add.
__global__ void block_sums(Sums p) {
  __shared__ float part[kSumThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  part[thread + (p.plant == kSharedOverflow)] = column_sum(p, row);
  if (p.plant != kNoBarrierBeforeSum) __syncthreads();
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    if (thread < half) part[thread] += part[thread + half];
    if (p.plant == kDivergentBarrier && thread >= 64) return;
    if (p.plant != kNoBarrierInTree) __syncthreads();
  }
  if (thread == 0) p.out[row] = part[0];
}

// out[row]: a warp a row.
__global__ void warp_sums(Sums p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kSumThreads / kWarp) + threadIdx.x / kWarp;
  float sum = 0;
  if (row < p.rows) {
    for (int64_t c = lane; c < p.columns; c += kWarp) sum += p.x[row * p.columns + c];
  }
  if (p.plant == kDivergentShuffle && lane >= 20) return;
  for (int by = p.plant == kNarrowShuffle ? 8 : 16; by > 0; by /= 2) sum += __shfl_xor_sync(kAllLanes, sum, by);
  if (lane == 0 && row < p.rows) p.out[row] = sum;
}

// out[row]: the rows' sums of fused products x*y + z of neighbours in a row, in the block's static and dynamic shared memory.
__global__ void fused_sums(Sums p) {
  FASTRES_DYNAMIC_SHARED(room);  // [kSumThreads]
  __shared__ float own[kSumThreads];
  float* const products = reinterpret_cast<float*>(room);
  const int thread = static_cast<int>(threadIdx.x);
  const float* row = p.x + static_cast<int64_t>(blockIdx.x) * p.columns;
  products[thread] = fmaf(row[thread], row[thread + 1], row[thread + 2]);
  own[thread] = row[thread];
  __syncthreads();
  float sum = 0;
  for (int t = thread; t < kSumThreads; t += 32) sum = fmaf(products[t], own[kSumThreads - 1 - t], sum);
  for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(kAllLanes, sum, by);
  if (thread == 0) p.out[blockIdx.x] = sum;
}

// out[0]: all blocks at once. Each adds up its rows and waits for the others; the first adds up all.
template <bool Static>
__global__ void grid_sum(Sums p) {
  FASTRES_DYNAMIC_SHARED(room);
  __shared__ float own[Static ? kSumThreads : 1];
  float* const part = Static ? own : reinterpret_cast<float*>(room);  // [kSumThreads]
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) sum += column_sum(p, row);
  part[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    sum = 0;
    for (int t = 0; t < kSumThreads; ++t) sum += part[t];
    p.partial[blockIdx.x] = sum;
    __threadfence();
    atomicAdd(p.arrived, 1u);
    if (p.plant != kNoBarrierBeforeSum) {
      while (*static_cast<const volatile unsigned*>(p.arrived) < gridDim.x + (p.plant == kDivergentBarrier)) __nanosleep(32);
    }
    __threadfence();
  }
  __syncthreads();
  if (blockIdx.x == 0 && thread == 0) {
    sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += p.partial[b];
    p.out[0] = sum;
  }
}

#ifdef FASTRES_LAUNCH
inline void launch_block_sums(const Sums& p, void* stream) {
  FASTRES_LAUNCH(block_sums, dim3(static_cast<unsigned>(p.rows)), dim3(kSumThreads), 0, stream, p);
}
inline void launch_fused_sums(const Sums& p, void* stream) {
  FASTRES_LAUNCH(fused_sums, dim3(static_cast<unsigned>(p.rows)), dim3(kSumThreads), kSumThreads * sizeof(float), stream, p);
}
inline void launch_warp_sums(const Sums& p, void* stream) {
  FASTRES_LAUNCH(warp_sums, dim3(static_cast<unsigned>((p.rows + 3) / 4)), dim3(kSumThreads), 0, stream, p);
}
template <bool Static>
void launch_grid_sum(const Sums& p, void* stream) {
  FASTRES_LAUNCH_COOPERATIVE(grid_sum<Static>, dim3(5), dim3(kSumThreads), Static ? 0 : kSumThreads * sizeof(float), stream, p);
}
#endif

}  // namespace samples
