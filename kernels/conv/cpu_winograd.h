// Winograd convolution, 3x3 with stride 1: F(4x4, 3x3) in float, F(2x2, 3x3) in bf16 (see winograd.md).
//
// A task takes a block of output tiles and a range of output channels. It transforms the inputs of its tiles into V; then for each block of
// 2 vectors of output channels it multiplies V by the transformed weights at each of the 36 (16) points, and transforms the sums M back,
// with bias, residual and ReLU on the way. V stays in the second cache: x and the residual are read once a task, the weights once a block
// of tiles, y is written once. Weights come from far away when there are many, so a block has enough tiles to hide that; V of many
// channels is then made in chunks, and the sums of all output channels wait in M for the next chunk.
//
// Output sizes are cut into tiles of 4 and a remainder, which gets a smaller tile with fewer points. The tiles of a block are ordered so
// that those which have a point are neighbours: its product has no rows that are not needed.
//
// Weights U [K/block][points][C][block] (float), or [K/block][points][C/2][block][2] (bf16 pairs, where the CPU multiplies them).
#pragma once

#include "cpu_direct.h"
#include "cpu_winograd_tile.h"

namespace fastres::FASTRES_ISA {

constexpr int64_t kWinogradBudget = 1200 << 10;  // bytes of V
constexpr int64_t kWinogradWeights = 640 << 10;  // weights of up to so many bytes stay in the second cache beside V and M
constexpr int64_t kWinogradTiles = 48 / kDirectTile * kDirectTile;  // of a block, at most

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

// The tile blocks and splits with the shortest estimated time. Per tile and vector of channels: the transform of the inputs costs about
// as much as 5 products at all points, one for each of 5 vectors of output channels. Products with few tiles wait for their weights.
template <class F>
void choose_tasks(const Conv& c, bool small, WinogradPlan& p) {
  const int64_t threads = max64(1, c.threads), at_least = max64(1, ceil_div(p.tiles, kWinogradTiles));
  int64_t best = -1;
  for (int64_t splits = 1; splits <= p.blocks && (splits == 1 || splits <= 2 * threads); splits *= 2) {
    for (int64_t rounds = 1; rounds <= 4; rounds *= 2) {
      const int64_t tile_blocks = max64(at_least, min64(p.tiles, ceil_div(rounds * threads, splits)));
      const int64_t per_task = max64(1, ceil_div(p.tiles, tile_blocks));
      const int64_t tasks = max64(1, ceil_div(p.tiles, per_task)) * splits;
      const int64_t products = per_task + 2 * ceil_div(per_task, kDirectTile) + (small ? 0 : max64(0, 24 - per_task));
      const int64_t time = ceil_div(tasks, threads) * (5 * per_task + ceil_div(p.blocks, splits) * 2 * products);
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
  choose_tasks<F>(c, points * s.in_channels * s.out_channels * element <= kWinogradWeights, p);
  const int64_t unit = kWidth * depth, most = max64(1, kWinogradBudget / (points * p.per_task * element * unit)) * unit;
  p.chunk = round_up(ceil_div(s.in_channels, ceil_div(s.in_channels, most)), unit);
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

// One vector of channels of all cells of a tile, the prologue applied; what lies behind the last channel is zero.
template <class F, Reads R, class T, bool Partial>
__attribute__((noinline)) void gather_cells(const Conv& c, const T* const* cells, const T* zeros, int points, int64_t channel, T* out) {
  const int64_t lanes = c.shape.in_channels - channel;
  for (int i = 0; i < points; ++i) {
    Vec x{};
    if (cells[i] != zeros) x = read_vector<R, T, Partial>(c, cells[i] - static_cast<const T*>(c.x) + channel, channel, lanes);
    store(out + i * kWidth, x);
  }
}

// The inputs of one tile, channels [first, last), to V. cells: [2][points], scratch.
template <class F, Reads R, class T, class E>
void transform_input(const Conv& c, const WinogradPlan& p, const WinogradTile& t, int64_t first, int64_t last, const T** cells,
                     const T* zeros, T* prologue, E* v) {
  const ConvShape& s = c.shape;
  const T* x = static_cast<const T*>(c.x) + t.image * s.height * s.width * s.in_channels;
  for (int r = 0; r < t.rows; ++r) {
    const int64_t row = t.row + r - s.pad_h, col = t.col - s.pad_w;
    const bool row_inside = row >= 0 && row < s.height;
    const T* from = x + (row * s.width + col) * s.in_channels;
    for (int q = 0; q < t.cols; ++q, from += s.in_channels) {
      cells[r * t.cols + q] = row_inside && col + q >= 0 && col + q < s.width ? from : zeros;
    }
  }
  const int points = t.rows * t.cols;
  const T** gathered = cells + F::kIn * F::kIn;
  with_sides<F>(t.rows, t.cols, [&]<int rows, int cols>() {
    int64_t i = first;
    if (R == Reads::plain) {
      const int64_t whole = (last - first) / kWidth;
      input_tile<F, rows, cols, T>(cells, first, whole, v, p.v_point);
      i += whole * kWidth;
    }
    if (i == last) return;
    for (int k = 0; k < points; ++k) gathered[k] = prologue + k * kWidth;
    for (; i + kWidth <= last; i += kWidth) {
      gather_cells<F, R, T, false>(c, cells, zeros, points, i, prologue);
      input_tile<F, rows, cols, T>(gathered, 0, 1, v + i - first, p.v_point);
    }
    if (i == last) return;
    gather_cells<F, R, T, true>(c, cells, zeros, points, i, prologue);
    input_tile<F, rows, cols, T>(gathered, 0, 1, v + i - first, p.v_point);
  });
}

// M tiles x 2 vectors of output channels in registers: v from tile to tile `stride` bytes, `words` of K. Adds to acc, or starts it.
// Weights that come next are brought into the second cache meanwhile, `step` floats for each word: spread evenly, or the loads that are
// needed now would queue behind them.
template <bool Pairs, int M>
__attribute__((noinline)) void winograd_products(const char* v, int64_t stride, int64_t words, const float* u, const float* next,
                                                 int64_t step, bool start, float* acc) {
  using P = Product<Pairs>;
  Vec sum[M][2] = {};
  if (!start) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      load(acc + m * 2 * kWidth, &sum[m][0]);
      load(acc + m * 2 * kWidth + kWidth, &sum[m][1]);
    }
  }
  // Four tiles share a base address, so that few address registers are needed.
  const int64_t stride3 = 3 * stride;
  const char* base[(M + 3) / 4];
  for (int i = 0; i < (M + 3) / 4; ++i) base[i] = v + 4 * i * stride;
  for (int64_t k = 0; k < words; ++k) {
    Vec w0, w1;
    load(u, &w0);
    load(u + kWidth, &w1);
    __builtin_prefetch(next, 0, 2);
    next += step;
    u += 2 * kWidth;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const int64_t to = m % 4 == 0 ? 0 : m % 4 == 1 ? stride : m % 4 == 2 ? 2 * stride : stride3;
      const Vec x = P::broadcast(base[m / 4] + to + 4 * k);
      sum[m][0] = P::accumulate(x, w0, sum[m][0]);
      sum[m][1] = P::accumulate(x, w1, sum[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store(acc + m * 2 * kWidth, sum[m][0]);
    store(acc + m * 2 * kWidth + kWidth, sum[m][1]);
  }
}

template <bool Pairs, int M = kDirectTile, class... A>
FASTRES_INLINE void winograd_any_products(int64_t count, A... a) {
  if constexpr (M > 1) {
    if (count < M) return winograd_any_products<Pairs, M - 1>(count, a...);
  }
  winograd_products<Pairs, M>(a...);
}

// The products at one point: tiles [first, last) of V and one block of weights, in pieces of equal size.
template <bool Pairs, class E>
FASTRES_INLINE void multiply_point(const WinogradPlan& p, const E* v, int64_t words, const float* u, int64_t first, int64_t last,
                                   bool start, float* m) {
  const int64_t pieces = ceil_div(last - first, kDirectTile), step = pieces == 0 ? 0 : ceil_div(kDirectBlock, pieces);
  const float* next = u + p.words * kDirectBlock;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t count = ceil_div(last - first, pieces - i);
    winograd_any_products<Pairs>(count, reinterpret_cast<const char*>(v + first * p.pixel), p.pixel * static_cast<int64_t>(sizeof(E)),
                                 words, u, next + i * step * words, step, start, m + first * kDirectBlock);
    first += count;
  }
}

// Whether a short side has point i of the full set.
template <class F>
FASTRES_INLINE bool has_point(int i, int side) {
  return i < side - 1 || i == F::kIn - 1;
}

template <class F, class T, bool Pairs>
struct WinogradTask {
  using E = typename Product<Pairs>::Panel::Element;
  static constexpr int64_t kPoints = F::kIn * F::kIn;

  const Conv& c;
  const WinogradPlan& p;
  const T** cells;
  T* zeros;
  T* prologue;
  WinogradList list;
  int64_t count;  // of tiles
  E* v;           // [points][tiles][channels of a chunk]
  float* m;       // [blocks, or one][points][tiles][block]

  template <Reads R>
  void transform_inputs(int64_t first, int64_t last) const {
    for (int64_t t = 0; t < count; ++t) {
      transform_input<F, R, T>(c, p, list.tiles[t], first, last, cells, zeros, prologue, v + t * p.pixel);
    }
  }

  void multiply(int64_t block, int64_t first, int64_t last, float* sums) const {
    constexpr int64_t depth = Product<Pairs>::kDepth;
    // The sides of the short tiles.
    const int short_rows = winograd_side<F>((p.rows - 1) * F::kOut, c.shape.out_height);
    const int short_cols = winograd_side<F>((p.cols - 1) * F::kOut, c.shape.out_width);
    const float* u = static_cast<const float*>(c.weights) + (block * kPoints * p.words + first / depth) * kDirectBlock;
    for (int point = 0; point < kPoints; ++point, u += p.words * kDirectBlock) {
      const bool all_rows = has_point<F>(point / F::kIn, short_rows), all_cols = has_point<F>(point % F::kIn, short_cols);
      const int64_t from = all_cols ? 0 : list.ends[0];
      const int64_t to = !all_rows ? list.ends[1] : all_cols ? count : list.ends[2];
      multiply_point<Pairs>(p, v + point * p.v_point, ceil_div(last - first, depth), u, from, to, first == 0, sums + point * p.m_point);
    }
  }

  void transform_outputs(int64_t block, const float* sums) const {
    const ConvShape& s = c.shape;
    const int64_t k0 = block * kDirectBlock, channels = min64(kDirectBlock, s.out_channels - k0);
    Vec bias[2] = {};
    for (int i = 0; c.bias != nullptr && i * kWidth < channels; ++i) {
      bias[i] = load<Vec, true>(c.bias + k0 + i * kWidth, min64(kWidth, channels - i * kWidth));
    }
    for (int64_t t = 0; t < count; ++t) {
      const WinogradTile& tile = list.tiles[t];
      const int64_t at = ((tile.image * s.out_height + tile.row) * s.out_width + tile.col) * s.out_channels + k0;
      const WinogradOut<T> out{static_cast<T*>(c.y) + at,
                               c.residual == nullptr ? nullptr : static_cast<const T*>(c.residual) + at,
                               s.out_width * s.out_channels,
                               s.out_channels,
                               static_cast<int>(min64(F::kOut, s.out_height - tile.row)),
                               static_cast<int>(min64(F::kOut, s.out_width - tile.col)),
                               channels,
                               bias,
                               c.relu ? 0.0f : -__builtin_inff()};
      with_sides<F>(tile.rows, tile.cols,
                    [&]<int rows, int cols>() { output_tile<F, rows, cols>(sums + t * kDirectBlock, p.m_point, out); });
    }
  }

  void run(int64_t tile_block, int64_t split) {
    const int64_t per_split = ceil_div(p.blocks, p.splits), first_tile = tile_block * p.per_task;
    count = min64(p.per_task, p.tiles - first_tile);
    list_tiles<F>(c.shape, p, first_tile, first_tile + count, list);
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      const int64_t first = chunk * p.chunk, last = min64(c.shape.in_channels, first + p.chunk);
      switch (reads_of(c)) {
        case Reads::affine: transform_inputs<Reads::affine>(first, last); break;
        case Reads::affine_relu: transform_inputs<Reads::affine_relu>(first, last); break;
        default: transform_inputs<Reads::plain>(first, last);
      }
      for (int64_t i = 0, block = split * per_split; i < per_split && block < p.blocks; ++i, ++block) {
        float* sums = m + (p.chunks == 1 ? 0 : i * p.m_block);
        multiply(block, first, last, sums);
        if (chunk + 1 == p.chunks) transform_outputs(block, sums);
      }
    }
  }
};

template <class F, class T, bool Pairs>
void run_winograd(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  const WinogradPlan p = winograd_plan<F, Pairs>(c);
  using Task = WinogradTask<F, T, Pairs>;
  char* base = static_cast<char*>(scratch);
  Task task{c,
            p,
            reinterpret_cast<const T**>(base + p.cells),
            reinterpret_cast<T*>(base + p.zeros),
            reinterpret_cast<T*>(base + p.prologue),
            {reinterpret_cast<WinogradTile*>(base + p.list), {}},
            0,
            reinterpret_cast<typename Task::E*>(base + p.v),
            reinterpret_cast<float*>(base + p.m)};
  __builtin_memset(task.zeros, 0, round_up(c.shape.in_channels, kWidth) * sizeof(T));
  for (int64_t i = begin; i < end; ++i) task.run(i % p.tile_blocks, i / p.tile_blocks);
}

// ---- the kernels as the engine sees them -----------------------------------------------------------------------------------------------
inline const char* winograd_refusal(const Conv& c) {
  const ConvShape& s = c.shape;
  if (s.kernel_h != 3 || s.kernel_w != 3) return "kernels other than 3x3";
  if (s.stride_h != 1 || s.stride_w != 1) return "strided convolutions";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "dilated convolutions";
  if (s.groups != 1) return "grouped convolutions";
  if (s.pad_h < 0 || s.pad_h > 1 || s.pad_w < 0 || s.pad_w > 1) return "padding of more than one";
  if (c.offset != nullptr) return "gradients as input";
  if (c.stats != nullptr) return "statistics of the output";
  if (c.pre != nullptr) return "masked outputs";
  return nullptr;
}

template <class F, bool Pairs>
struct WinogradKernel {
  using T = typename Product<Pairs>::Panel::Element;

  static int64_t packed_bytes(const ConvShape& s, bool) {
    return ceil_div(s.out_channels, kDirectBlock) * F::kIn * F::kIn * ceil_div(s.in_channels, Product<Pairs>::kDepth) * kDirectBlock * 4;
  }
  static int64_t pack_items(const ConvShape& s, bool) { return ceil_div(s.out_channels, kDirectBlock); }

  // The transform is computed in double and rounded once.
  static void pack(const ConvShape& s, bool bfloat16, const WeightView& weight, void* packed, int64_t begin, int64_t end) {
    constexpr int64_t depth = Product<Pairs>::kDepth, n = F::kIn;
    const int64_t words = ceil_div(s.in_channels, depth);
    for (int64_t k = begin * kDirectBlock; k < end * kDirectBlock; ++k) {
      T* to = static_cast<T*>(packed) + (k / kDirectBlock * n * n * words * kDirectBlock + k % kDirectBlock) * depth;
      for (int64_t i = 0; i < words * depth; ++i) {
        double g[9] = {};
        if (k < s.out_channels && i < s.in_channels) {
          const float* from = weight.data + k * weight.out + i * weight.in;
          for (int64_t tap = 0; tap < 9; ++tap) g[tap] = from[(weight.reversed ? 8 - tap : tap) * weight.tap_stride];
        }
        for (int r = 0; r < n; ++r) {
          double row[3];
          for (int q = 0; q < 3; ++q) row[q] = winograd_weight<F>(r, g[q], g[3 + q], g[6 + q]);
          for (int q = 0; q < n; ++q) {
            const float u = static_cast<float>(winograd_weight<F>(q, row[0], row[1], row[2]));
            const int64_t at = ((r * n + q) * words + i / depth) * kDirectBlock * depth + i % depth;
            from_float(bfloat16 ? rounded<bf16>(u) : u, to + at);
          }
        }
      }
    }
  }

  static int64_t scratch_bytes(const Conv& c) { return winograd_plan<F, Pairs>(c).bytes; }
  static int64_t tasks(const Conv& c) {
    const WinogradPlan p = winograd_plan<F, Pairs>(c);
    return p.tile_blocks * p.splits;
  }
};

inline const char* winograd4_refusal(const Conv& c) { return c.bfloat16 ? "bfloat16" : winograd_refusal(c); }
inline const char* winograd2_refusal(const Conv& c) { return c.bfloat16 ? winograd_refusal(c) : "float32"; }

using Winograd4 = WinogradKernel<WinogradTile4, false>;
using Winograd2 = WinogradKernel<WinogradTile2, kMultipliesPairs>;

static const ConvKernel winograd4 = {
    "winograd4",     winograd4_refusal,        Winograd4::packed_bytes, Winograd4::pack_items,
    Winograd4::pack, Winograd4::scratch_bytes, Winograd4::tasks,        run_winograd<WinogradTile4, float, false>};
static const ConvKernel winograd2 = {
    "winograd2",     winograd2_refusal,        Winograd2::packed_bytes, Winograd2::pack_items,
    Winograd2::pack, Winograd2::scratch_bytes, Winograd2::tasks,        run_winograd<WinogradTile2, bf16, kMultipliesPairs>};

}  // namespace fastres::FASTRES_ISA
