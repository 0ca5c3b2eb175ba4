// Sample kernels that the CUDA emulation is proven on, with errors to plant (FASTRES_PLANT). Compiled by g++ and by nvcc.
#pragma once

#include "kernels/common/cuda_device.cuh"

#ifndef FASTRES_PLANT
#define FASTRES_PLANT 0
#endif

namespace samples {

using namespace fastres::cuda;

// Errors that can be planted.
enum Plant : int {
  kNothing,
  kNoBarrierAfterWait,   // the tiles' copies are read without a barrier
  kNoBarrierBeforeCopy,  // the next copies may overtake a warp that still reads: a write after a read
  kWaitForTooFew,        // one group too many may be under way
  kGuardOffByOne,        // one row past the end is read
  kWrongFragment,        // operand b's registers are swapped
  kMisaligned,           // a 16-byte store two elements off
  kDivergentBarrier,     // only the first warp comes to a barrier
  kSharedOverflow,       // one element past the end of shared memory is written
  kNoBarrierBeforeSum,   // partial sums are read before all are there
  kNarrowShuffle,        // the last step of the shuffles is left out
};
constexpr int kPlant = FASTRES_PLANT;

template <class T>
struct Gemm {
  int m, n, k;  // any m; n a multiple of 8, k one of kDepth elements
  const T* a;   // [m, k]
  const T* b;   // [n, k]
  T* out;       // [m, n]
};

constexpr int kTile = 32, kGemmThreads = 128, kStages = 2;
constexpr int kRowBytes = 64, kPitch = kRowBytes + 16;  // bytes of a tile's row; rows are a bank apart

// out = a · b' in tiles of 32 x 32, one a block of four warps; the warps share a tile as 2 x 2 pieces of 16 x 16. Operand tiles [32 rows,
// 64 bytes] go through shared memory, the next ones under way while a pair is multiplied.
template <class T>
__global__ void __launch_bounds__(kGemmThreads) gemm(Gemm<T> p) {
  constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T)), kVector = 16 / static_cast<int>(sizeof(T));
  FASTRES_DYNAMIC_SHARED(room);  // [kStages][2 operands][kTile][kPitch]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int first_m = static_cast<int>(blockIdx.x) * kTile, first_n = static_cast<int>(blockIdx.y) * kTile;
  const auto tile = [&](int stage, int operand) { return room + (stage * 2 + operand) * kTile * kPitch; };
  const auto copy = [&](int step) {
    const int row = thread / 4, vector = thread % 4;  // 32 rows of 4 x 16 bytes: one copy a thread and operand
    const int m = first_m + row, n = first_n + row;
    const int64_t at = static_cast<int64_t>(step) * kDepth + vector * kVector;
    const bool valid_m = m < p.m + (kPlant == kGuardOffByOne), valid_n = n < p.n;
    copy_async<16>(tile(step % kStages, 0) + row * kPitch + vector * 16, p.a + m * static_cast<int64_t>(p.k) + at, valid_m);
    copy_async<16>(tile(step % kStages, 1) + row * kPitch + vector * 16, p.b + n * static_cast<int64_t>(p.k) + at, valid_n);
  };
  float sum[2][4] = {};
  const int steps = p.k / kDepth;
  copy(0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy(step + 1);
    commit_copies();
    wait_copies<kPlant == kWaitForTooFew ? 2 : 1>();
    if (kPlant == kDivergentBarrier) {
      if (warp == 0) __syncthreads();
    } else if (kPlant != kNoBarrierAfterWait) {
      __syncthreads();
    }
    const int m = warp / 2 * 16, n = warp % 2 * 16;
    for (int piece = 0; piece < kRowBytes; piece += 32) {
      uint32_t a[4], b[4];
      // Matrices of a: rows 0 to 7, 8 to 15, then the same of the next 16 bytes; of b the next 16 bytes come first.
      load_matrices<false>(a, tile(step % kStages, 0) + (m + lane % 16) * kPitch + piece + lane / 16 * 16);
      load_matrices<false>(b, tile(step % kStages, 1) + (n + lane / 16 * 8 + lane % 8) * kPitch + piece + lane / 8 % 2 * 16);
      for (int half = 0; half < 2; ++half) {
        const int low = kPlant == kWrongFragment ? 1 : 0;
        const uint32_t pair[2] = {b[2 * half + low], b[2 * half + 1 - low]};
        multiply<T>(sum[half], a, pair);
      }
    }
    if (kPlant != kNoBarrierBeforeCopy) __syncthreads();
  }
  if (kPlant == kSharedOverflow && thread == 0) room[kStages * 2 * kTile * kPitch] = 1;
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < 4; r += 2) {
      const int m = first_m + warp / 2 * 16 + lane / 4 + r * 4, n = first_n + warp % 2 * 16 + half * 8 + lane % 4 * 2;
      if (m < p.m && n < p.n) {
        const float pair[2] = {sum[half][r], sum[half][r + 1]};
        store<2>(p.out + static_cast<int64_t>(m) * p.n + n + (kPlant == kMisaligned ? 1 : 0), pair);
      }
    }
  }
}

template <class T>
void launch_gemm(const Gemm<T>& p, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.m + kTile - 1) / kTile), static_cast<unsigned>((p.n + kTile - 1) / kTile));
  FASTRES_LAUNCH(gemm<T>, grid, dim3(kGemmThreads), kStages * 2 * kTile * kPitch, stream, p);
}

}  // namespace samples
