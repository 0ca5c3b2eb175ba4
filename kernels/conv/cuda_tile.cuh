// The one main loop of all convolution kernels: a tile of D[M, N] = sum over k of A[m, k]*B[n, k] on tensor cores.
//
// A step of the reduction is 64 bytes of elements (32 of 16 bits, 16 of float) for every row of the two operands. Steps travel through a
// ring of stages in shared memory by asynchronous copies, kStages - 1 ahead of the products. What differs between forward and gradients
// is in the operands (where a row's bytes lie, what becomes of them between shared memory and the tensor cores) and in what is done with
// the sums afterwards:
//
//   Operand:  kStageBytes                            its part of a stage
//             load(stage)                            issues the copies of its next step, and moves on
//             arrived(stage)                         if it has it: this thread's copies of a step have landed; no other's, to be sure
//             fragments(stage, half, registers)      half a step for this warp, transformed; called once for each half, in order
//             next()                                 the step that fragments() reads is over
#pragma once

#include "../common/cuda_device.cuh"

namespace fastres::cuda {

constexpr int kStepBytes = 64;
constexpr int kPitch = kStepBytes + 16;  // of a row in shared memory: eight rows of 16 bytes then meet all banks once

template <class T>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));  // elements of a step
template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes

// Rows x columns of D that a block owns, cut among its warps; Split: float products of nearly full precision.
template <class Element, bool SplitProducts, int Rows, int Columns, int WarpRows, int WarpColumns, int Stages>
struct Tile {
  using T = Element;
  static constexpr bool kSplit = SplitProducts;
  static constexpr int kRows = Rows, kColumns = Columns, kStages = Stages;
  static constexpr int kWarpRows = WarpRows, kWarpColumns = WarpColumns;  // of one warp
  static constexpr int kAcross = Columns / WarpColumns;                   // warps side by side
  static constexpr int kDown = Rows / WarpRows;
  static constexpr int kThreads = kDown * kAcross * kWarp;
  static constexpr int kBlocks = kThreads <= 128 ? 2 : 1;                          // resident on a multiprocessor at least
  static constexpr int kRowTiles = WarpRows / 16, kColumnTiles = WarpColumns / 8;  // of one instruction
  static_assert(kColumnTiles % 2 == 0 && !(kSplit && sizeof(T) != 4));

  FASTRES_DEVICE static int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  FASTRES_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  FASTRES_DEVICE static int first_row() { return warp() / kAcross * kWarpRows; }  // of this warp
  FASTRES_DEVICE static int first_column() { return warp() % kAcross * kWarpColumns; }

  // acc[i][j][e] is D[row_of(i, e / 2)][column_of(j, e % 2)] of the tile.
  float acc[kRowTiles][kColumnTiles][4];
  FASTRES_DEVICE static int row_of(int i, int below) { return first_row() + i * 16 + below * 8 + lane() / 4; }
  FASTRES_DEVICE static int column_of(int j, int right) { return first_column() + j * 8 + lane() % 4 * 2 + right; }
};

// ---- Fragments from a stage -----------------------------------------------------------------------------------------------------------
// Rows of k: shared [rows][kPitch bytes].
template <class Tile>
FASTRES_DEVICE void left_rows(const unsigned char* rows, int half, int i, uint32_t (&a)[4]) {
  const int lane = Tile::lane();
  load_matrices<false>(a, rows + (Tile::first_row() + i * 16 + lane % 16) * kPitch + half * (kStepBytes / 2) + lane / 16 * 16);
}
template <class Tile>
FASTRES_DEVICE void right_rows(const unsigned char* rows, int half, uint32_t (&b)[Tile::kColumnTiles][2]) {
  const int lane = Tile::lane();
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; j += 2) {
    uint32_t r[4];
    const int row = Tile::first_column() + j * 8 + lane / 16 * 8 + lane % 8;
    load_matrices<false>(r, rows + row * kPitch + half * (kStepBytes / 2) + lane / 8 % 2 * 16);
    b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
  }
}

// Columns of k: shared [elements of a step][pitch bytes], a row holds `width` neighbours of m or n. The pad makes eight rows (of 16 bytes),
// or four rows and eight columns of floats, meet all banks once.
template <class T, int Width>
constexpr int kColumnPitch = Width * static_cast<int>(sizeof(T)) + (sizeof(T) == 4 ? 32 : 16);
template <class Tile>
FASTRES_DEVICE void left_columns(const unsigned char* columns, int half, int i, uint32_t (&a)[4]) {
  using T = typename Tile::T;
  constexpr int pitch = kColumnPitch<T, Tile::kRows>;
  const int lane = Tile::lane(), row = Tile::first_row() + i * 16;
  if constexpr (sizeof(T) == 2) {
    const int k = half * 16 + lane / 16 * 8 + lane % 8;
    load_matrices<true>(a, columns + k * pitch + (row + lane / 8 % 2 * 8) * 2);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = half * 8 + e / 2 * 4 + lane % 4;
      a[e] = *reinterpret_cast<const uint32_t*>(columns + k * pitch + (row + e % 2 * 8 + lane / 4) * 4);
    }
  }
}
template <class Tile>
FASTRES_DEVICE void right_columns(const unsigned char* columns, int half, uint32_t (&b)[Tile::kColumnTiles][2]) {
  using T = typename Tile::T;
  constexpr int pitch = kColumnPitch<T, Tile::kColumns>;
  const int lane = Tile::lane(), column = Tile::first_column();
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; j += 2) {
    if constexpr (sizeof(T) == 2) {
      uint32_t r[4];
      const int k = half * 16 + lane / 8 % 2 * 8 + lane % 8;
      load_matrices<true>(r, columns + k * pitch + (column + j * 8 + lane / 16 * 8) * 2);
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int k = half * 8 + e % 2 * 4 + lane % 4;
        b[j + e / 2][e % 2] = *reinterpret_cast<const uint32_t*>(columns + k * pitch + (column + (j + e / 2) * 8 + lane / 4) * 4);
      }
    }
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------------------------
// A float as two that a tensor core reads without loss (the first 19 bits): high, rounded to nearest, and low, what is left, rounded again.
// An infinity or NaN, or what rounds to one, is in `whole` only, for the product of the high parts; in the others it would meet zeros.
struct Halves {
  uint32_t whole, high, low;
  FASTRES_DEVICE explicit Halves(uint32_t bits) {
    constexpr uint32_t half_unit = 0x1000u, kept = 0xffffe000u, exponent = 0x7f800000u;
    const uint32_t nearest = (bits + half_unit) & kept;
    const bool finite = (nearest & exponent) != exponent && (bits & exponent) != exponent;
    whole = finite ? nearest : bits;
    high = finite ? nearest : 0u;
    low = finite ? __float_as_uint(__uint_as_float(bits) - __uint_as_float(nearest)) + half_unit : 0u;
  }
};

template <class Tile>
FASTRES_DEVICE void multiply_tiles(Tile& d, const uint32_t (&a)[Tile::kRowTiles][4], const uint32_t (&b)[Tile::kColumnTiles][2]) {
  using T = typename Tile::T;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
    if constexpr (Tile::kSplit) {
      uint32_t whole[4], high[4], low[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Halves h(a[i][e]);
        whole[e] = h.whole, high[e] = h.high, low[e] = h.low;
      }
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const Halves first(b[j][0]), second(b[j][1]);
        multiply<T>(d.acc[i][j], low, {first.high, second.high});  // the small ones first
        multiply<T>(d.acc[i][j], high, {first.low, second.low});
        multiply<T>(d.acc[i][j], whole, {first.whole, second.whole});
      }
    } else {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) multiply<T>(d.acc[i][j], a[i], b[j]);
    }
  }
}

template <class Left, class Right, class Tile>
constexpr int kRingBytes = (Left::kStageBytes + Right::kStageBytes) * Tile::kStages;

// d = the tile's sums. `ring`: kRingBytes of shared memory, free for other use when this returns.
template <class Left, class Right, class Tile>
FASTRES_DEVICE void main_loop(Tile& d, Left& left, Right& right, int steps, unsigned char* ring) {
  constexpr int stage_bytes = Left::kStageBytes + Right::kStageBytes;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) d.acc[i][j][e] = 0.0f;
    }
  }
  int filled = 0, used = 0;  // stages of the ring
  const auto advance = [](int& stage) { stage = stage + 1 == Tile::kStages ? 0 : stage + 1; };
  const auto fetch = [&](int step) {
    if (step < steps) {
      unsigned char* const stage = ring + filled * stage_bytes;
      left.load(stage);
      right.load(stage + Left::kStageBytes);
      advance(filled);
    }
    commit_copies();  // an empty group too: the wait below counts them
  };
#pragma unroll 1
  for (int step = 0; step < Tile::kStages - 1; ++step) fetch(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    unsigned char* const stage = ring + used * stage_bytes;
    if constexpr (requires { left.arrived(stage); }) left.arrived(stage);
    if constexpr (requires { right.arrived(stage); }) right.arrived(stage + Left::kStageBytes);
    __syncthreads();  // this step has landed for all, and all are done with the one before, whose stage is filled next
    fetch(step + Tile::kStages - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[Tile::kRowTiles][4], b[Tile::kColumnTiles][2];
      right.fragments(stage + Left::kStageBytes, half, b);
      left.fragments(stage, half, a);
      multiply_tiles(d, a, b);
    }
    left.next();
    right.next();
    advance(used);
  }
  wait_copies<0>();
  __syncthreads();
}

}  // namespace fastres::cuda
