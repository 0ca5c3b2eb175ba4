// What the kernels share that add up row tiles: a block of kMergeSlices slices, each a warp whose lanes are 32 columns.
#pragma once

#include "../common/cuda_device.cuh"
#include "cuda_shape.h"

namespace fastres::cuda {

constexpr int kMergeThreads = 256;
constexpr int kMergeSlices = kMergeThreads / kWarp;

// The sum of `mine` over the slices, for each lane; to all threads. `shared`: free again when this returns.
FASTRES_DEVICE double add_slices(double (&shared)[kMergeSlices][kWarp], double mine) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  shared[threadIdx.x / kWarp][lane] = mine;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kMergeSlices; ++i) sum += shared[i][lane];
  __syncthreads();
  return sum;
}

}  // namespace fastres::cuda
