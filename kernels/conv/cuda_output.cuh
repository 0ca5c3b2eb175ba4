// The way of a finished tile to memory, through shared memory, so that global accesses are 16 bytes wide; and its statistics.
#pragma once

#include "cuda_tile.cuh"

namespace fastres::cuda {

// A tile [rows][columns] of T in shared memory, the same place that the ring of stages had.
template <class Tile>
struct Output {
  using T = typename Tile::T;
  static constexpr int kRowPitch = Tile::kColumns * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kBytes = Tile::kRows * kRowPitch;
  static constexpr int kChunks = Tile::kColumns / kChunk<T>;  // 16-byte pieces of a row

  unsigned char* shared;
  int columns, first_column;  // of the matrix in memory, and where the tile begins
  bool wide;                  // 16-byte accesses; else element by element

  FASTRES_DEVICE T* at(int row, int column) const { return reinterpret_cast<T*>(shared + row * kRowPitch) + column; }

  // Starts copying a tile of `global` [.., columns] here; row_of(row): its row in `global`, or -1, which is filled with zeros.
  template <class RowOf>
  FASTRES_DEVICE void fetch(const void* global, RowOf row_of) const {
    const T* const from = static_cast<const T*>(global);
    const int width = wide ? kChunk<T> : 1, pieces = Tile::kColumns / width;
    for (int i = threadIdx.x; i < Tile::kRows * pieces; i += Tile::kThreads) {
      const int row = i / pieces, column = i % pieces * width;
      const int64_t source = row_of(row);
      const bool valid = source >= 0 && first_column + column < columns;
      const T* const place = from + (valid ? source * columns + first_column + column : 0);
      if (wide) {
        copy_async<16>(at(row, column), place, valid);
      } else {
        *at(row, column) = valid ? *place : T{};
      }
    }
    commit_copies();
  }
  FASTRES_DEVICE static void arrived() {
    wait_copies<0>();
    __syncthreads();
  }

  template <class RowOf>
  FASTRES_DEVICE void store(void* global, RowOf row_of) const {
    T* const to = static_cast<T*>(global);
    __syncthreads();
    const int width = wide ? kChunk<T> : 1, pieces = Tile::kColumns / width;
    for (int i = threadIdx.x; i < Tile::kRows * pieces; i += Tile::kThreads) {
      const int row = i / pieces, column = i % pieces * width;
      const int64_t target = row_of(row);
      if (target < 0 || first_column + column >= columns) continue;
      T* const place = to + target * columns + first_column + column;
      if (wide) {
        *reinterpret_cast<Pack<T, kChunk<T>>*>(place) = *reinterpret_cast<const Pack<T, kChunk<T>>*>(at(row, column));
      } else {
        *place = *at(row, column);
      }
    }
  }
};

// Sums over the rows of a tile for each of its columns, in a fixed order: over a thread's rows, its warp's, then the warps below each
// other. value(i, j, e): the addend at acc[i][j][e]. `shared`: [kDown][columns] float. The sums are in shared[0 .. columns) after a
// barrier.
template <class Tile, class Value>
FASTRES_DEVICE void sum_columns(float* shared, Value value) {
#pragma unroll
  for (int j = 0; j < Tile::kColumnTiles; ++j) {
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) sum += value(i, j, right) + value(i, j, right + 2);
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (Tile::lane() < 4) shared[Tile::warp() / Tile::kAcross * Tile::kColumns + Tile::column_of(j, right)] = sum;
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < Tile::kColumns; column += Tile::kThreads) {
    float sum = shared[column];
    for (int warp = 1; warp < Tile::kDown; ++warp) sum += shared[warp * Tile::kColumns + column];
    shared[column] = sum;
  }
  __syncthreads();
}

template <class Tile>
constexpr int kSumBytes = Tile::kDown * Tile::kColumns * 4;

}  // namespace fastres::cuda
