// A sample kernel that the CUDA emulation is proven on, compiled by g++ and by nvcc, with errors to plant: a matrix product through the
// tensor cores, with asynchronous copies.
#pragma once

#include "plants.h"

namespace samples {

using namespace fastres::cuda;

template <class T>
struct Gemm {
  Plant plant;
  int m, n, k;  // any m; n even, k a multiple of 64 bytes
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
    const bool valid_m = m < p.m + (p.plant == kGuardOffByOne), valid_n = n < p.n;
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
    p.plant == kWaitForTooFew ? wait_copies<2>() : wait_copies<1>();
    if (p.plant == kDivergentBarrier) {
      if (warp == 0) __syncthreads();
    } else if (p.plant != kNoBarrierAfterWait) {
      __syncthreads();
    }
    const int m = warp / 2 * 16, n = warp % 2 * 16;
    for (int piece = 0; piece < kRowBytes; piece += 32) {
      uint32_t a[4], b[4];
      // Matrices of a: rows 0 to 7, 8 to 15, then the same of the next 16 bytes; of b the next 16 bytes come first.
      load_matrices<false>(a, tile(step % kStages, 0) + (m + lane % 16) * kPitch + piece + lane / 16 * 16);
      load_matrices<false>(b, tile(step % kStages, 1) + (n + lane / 16 * 8 + lane % 8) * kPitch + piece + lane / 8 % 2 * 16);
      for (int half = 0; half < 2; ++half) {
        const bool wrong = p.plant == kWrongFragment;
        const uint32_t pair[2] = {wrong ? b[2 * half + 1] : b[2 * half], wrong ? b[2 * half] : b[2 * half + 1]};
        multiply<T>(sum[half], a, pair);
      }
    }
    if (p.plant != kNoBarrierBeforeCopy) __syncthreads();
  }
  if (p.plant == kSharedOverflow && thread == 0) room[kStages * 2 * kTile * kPitch] = 1;
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < 4; r += 2) {
      const int m = first_m + warp / 2 * 16 + lane / 4 + r * 4, n = first_n + warp % 2 * 16 + half * 8 + lane % 4 * 2;
      if (m < p.m && n < p.n) {
        const float pair[2] = {sum[half][r], sum[half][r + 1]};
        store<2>(p.out + static_cast<int64_t>(m) * p.n + n + (p.plant == kMisaligned ? 1 : 0), pair);
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
