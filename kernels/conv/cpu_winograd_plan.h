// How a Winograd convolution is cut: blocks of tiles and ranges of output channels, the layout of a task's scratch, and the order of tiles.
#pragma once

#include "cpu_direct.h"
#include "cpu_winograd_tile.h"

namespace fastres::FASTRES_ISA {

constexpr int64_t kWinogradBudget = 1200 << 10;  // bytes of V
constexpr int64_t kWinogradWeights = 640 << 10;  // weights of up to so many bytes stay in the second cache beside V and M
constexpr int64_t kWinogradTiles = 48 / kDirectTile * kDirectTile;  // of a block, at most

constexpr int64_t kWinogradChain = 128;  // products that are added up one by one: long chains lose bits to large sums

struct WinogradTile {
  int64_t image, row, col;  // of the first output
  int rows, cols;           // inputs of the transform
};

// How a convolution is cut into tasks, and the layout of a task's scratch.
struct WinogradPlan {
  int64_t rows, cols;                                 // tiles of an image
  int64_t tiles, per_task;                            // of all images, of a block
  int64_t tile_blocks, splits;                        // tasks = tile_blocks * splits; a split is a range of blocks of output channels
  int64_t blocks, words;                              // of output channels; words of K of one product
  int64_t chunk, chunks;                              // channels whose V is made at a time
  int64_t pixel, v_point;                             // elements of V from tile to tile, from point to point
  int64_t m_point, m_block;                           // floats of M from point to point, from block to block
  int64_t cells, zeros, prologue, list, v, m, bytes;  // scratch
};

// Inputs of the transform for the tile that starts at output `at` of `size`.
template <class F>
FASTRES_INLINE int winograd_side(int64_t at, int64_t size) {
  const int64_t left = size - at;
  if (F::kOut == 2 || left >= F::kOut) return F::kIn;
  return left == 3 ? 5 : 4;
}

// `at` bytes or more that are an odd number of cache lines: neighbours don't meet in the same sets.
FASTRES_INLINE int64_t odd_lines(int64_t bytes) { return (ceil_div(bytes, 64) | 1) * 64; }

// The tile blocks and splits with the shortest estimated time. The transform of a tile's inputs costs a third of its products with one
// block of output channels, and every split repeats it. Products of few tiles wait for their weights (`few`: those stay close).
inline void choose_tasks(const Conv& c, bool few, WinogradPlan& p) {
  const int64_t threads = max64(1, c.threads), at_least = max64(1, ceil_div(p.tiles, kWinogradTiles));
  const int64_t uneven = threads > 1 ? 1 : 0;  // a quarter of a task more: threads seldom end together
  int64_t best = -1;
  for (int64_t splits = 1; splits <= p.blocks && (splits == 1 || splits <= 2 * threads); splits *= 2) {
    for (int64_t rounds = 1; rounds <= 4; rounds *= 2) {
      const int64_t tile_blocks = max64(at_least, min64(p.tiles, ceil_div(rounds * threads, splits)));
      const int64_t per_task = max64(1, ceil_div(p.tiles, tile_blocks));
      const int64_t tasks = max64(1, ceil_div(p.tiles, per_task)) * splits;
      const int64_t products = per_task + 2 * ceil_div(per_task, kDirectTile) + (few ? 0 : max64(0, 24 - per_task));
      const int64_t time = (4 * ceil_div(tasks, threads) + uneven) * (per_task + ceil_div(p.blocks, splits) * 3 * products);
      if (best >= 0 && time >= best) continue;
      best = time;
      p.per_task = per_task;
      p.splits = splits;
    }
  }
  p.tile_blocks = max64(1, ceil_div(p.tiles, p.per_task));
  p.splits = ceil_div(p.blocks, ceil_div(p.blocks, p.splits));
}

template <class F, bool Pairs>
WinogradPlan winograd_plan(const Conv& c) {
  using E = typename Product<Pairs>::Panel::Element;
  constexpr int64_t points = F::kIn * F::kIn, element = sizeof(E), depth = Product<Pairs>::kDepth;
  const ConvShape& s = c.shape;
  const int64_t activation = c.bfloat16 ? 2 : 4;
  WinogradPlan p;
  p.rows = ceil_div(s.out_height, F::kOut);
  p.cols = ceil_div(s.out_width, F::kOut);
  p.tiles = s.images * p.rows * p.cols;
  p.blocks = ceil_div(s.out_channels, kDirectBlock);
  p.words = ceil_div(s.in_channels, depth);
  choose_tasks(c, points * s.in_channels * s.out_channels * element <= kWinogradWeights, p);
  // Chunks are whole chains: then a sum has the same bits however many threads and images there are.
  const int64_t unit = kWinogradChain * depth, most = max64(1, kWinogradBudget / (points * p.per_task * element * unit)) * unit;
  p.chunk = round_up(ceil_div(s.in_channels, ceil_div(s.in_channels, most)), s.in_channels > most ? unit : kWidth);
  p.chunks = ceil_div(s.in_channels, p.chunk);
  p.pixel = odd_lines(p.chunk * element) / element;
  p.v_point = odd_lines(p.per_task * p.pixel * element) / element;
  p.m_point = odd_lines(p.per_task * kDirectBlock * 4) / 4;
  p.m_block = points * p.m_point;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  p.cells = take(2 * points * static_cast<int64_t>(sizeof(void*)));
  p.zeros = take(round_up(s.in_channels, kWidth) * activation);
  p.prologue = take(points * kVectorBytes);
  p.list = take(p.per_task * static_cast<int64_t>(sizeof(WinogradTile)));
  p.v = take(points * p.v_point * element);
  p.m = take((p.chunks == 1 ? 1 : ceil_div(p.blocks, p.splits)) * p.m_block * 4);
  p.bytes = at;
  return p;
}

// The tiles of a block, in four classes: short columns, full, short rows, short both. Then the tiles with a given point of rows come
// first or are all, those with a given point of columns leave out the first class or the last, or are all.
struct WinogradList {
  WinogradTile* tiles;
  int64_t ends[4];  // of the classes
};

template <class F>
void list_tiles(const ConvShape& s, const WinogradPlan& p, int64_t first, int64_t last, WinogradList& list) {
  int64_t starts[4] = {};
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t row = t / p.cols % p.rows * F::kOut, col = t % p.cols * F::kOut;
      const int rows = winograd_side<F>(row, s.out_height), cols = winograd_side<F>(col, s.out_width);
      const int kind = rows == F::kIn ? (cols == F::kIn ? 1 : 0) : (cols == F::kIn ? 2 : 3);
      if (pass == 0) {
        ++starts[kind];
      } else {
        list.tiles[starts[kind]++] = {t / (p.rows * p.cols), row, col, rows, cols};
      }
    }
    int64_t sum = 0;
    for (int k = 0; k < 4; ++k) {
      const int64_t n = starts[k];
      if (pass == 0) {
        starts[k] = sum;
        sum += n;
        list.ends[k] = sum;
      }
    }
  }
}

// Whether a short side has point i of the full set.
template <class F>
FASTRES_INLINE bool has_point(int i, int side) {
  return i < side - 1 || i == F::kIn - 1;
}

}  // namespace fastres::FASTRES_ISA
