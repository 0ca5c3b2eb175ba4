// Winograd convolution, 3x3 with stride 1: F(4x4, 3x3) in float, F(2x2, 3x3) in bf16 (see winograd.md).
//
// A task takes a block of output tiles and a range of output channels. It transforms the inputs of its tiles, all channels, into V; then
// for each block of 2 vectors of output channels it multiplies V by the transformed weights at each of the 36 (16) points, and transforms
// the sums M back, with bias, residual and ReLU on the way. V and M stay in the second cache: x and the residual are read once a task, the
// weights once a block of tiles, y is written once.
//
// Output sizes are cut into tiles of 4 and a remainder, which gets a smaller tile with fewer points. The tiles of a block are ordered so
// that those which have a point are neighbours: its product has no rows that are not needed.
//
// Weights U [K/block][points][C][block] (float), or [K/block][points][C/2][block][2] (bf16 pairs, where the CPU multiplies them).
#pragma once

#include "cpu_direct.h"
#include "cpu_winograd_tile.h"

namespace fastres::FASTRES_ISA {

constexpr int64_t kWinogradBudget = 1200 << 10;  // bytes of V, M and the weights that meet them

struct WinogradTile {
  int64_t image, row, col;  // of the first output
  int rows, cols;           // inputs of the transform
};

// How a convolution is cut into tasks, and the layout of a task's scratch.
struct WinogradPlan {
  int64_t rows, cols;                                 // tiles of an image
  int64_t tiles, per_task;                            // of all images, of a block
  int64_t tile_blocks, splits;                        // tasks = tile_blocks * splits; a split is a range of blocks of output channels
  int64_t blocks, words;                              // of output channels; words of K in one product
  int64_t pixel, v_point;                             // elements of V from tile to tile, from point to point
  int64_t m_point;                                    // floats of M from point to point
  int64_t cells, zeros, prologue, list, v, m, bytes;  // scratch
};

// Inputs of the transform for the tile that starts at output `at` of `size`.
template <class F>
FASTRES_INLINE int winograd_side(int64_t at, int64_t size) {
  const int64_t left = size - at;
  if (F::kOut == 2 || left >= F::kOut) return F::kIn;
  return left == 3 ? 5 : 4;
}

template <class F, bool Pairs>
WinogradPlan winograd_plan(const Conv& c) {
  using E = typename Product<Pairs>::Panel::Element;
  constexpr int64_t points = F::kIn * F::kIn, element = sizeof(E), depth = Product<Pairs>::kDepth;
  const ConvShape& s = c.shape;
  const int64_t padded = round_up(s.in_channels, kWidth), activation = c.bfloat16 ? 2 : 4;
  WinogradPlan p;
  p.rows = ceil_div(s.out_height, F::kOut);
  p.cols = ceil_div(s.out_width, F::kOut);
  p.tiles = s.images * p.rows * p.cols;
  p.blocks = ceil_div(s.out_channels, kDirectBlock);
  p.words = ceil_div(s.in_channels, depth);
  p.pixel = (padded * element / 64 | 1) * 64 / element;  // odd in cache lines: neighbours don't meet in the same sets
  if (p.pixel < padded) p.pixel += 128 / element;
  // Weights are reused across a block's tiles from the first cache; those of all points should stay beside V only where they are few.
  const int64_t per_tile = points * (p.pixel * element + kDirectBlock * 4);
  const int64_t weights = points * s.in_channels * round_up(s.out_channels, kDirectBlock) * element;
  const int64_t room = weights <= kWinogradBudget / 2 ? kWinogradBudget - weights : kWinogradBudget;
  int64_t most = max64(4, room / per_tile);
  if (most > kDirectTile) most = most / kDirectTile * kDirectTile;
  const int64_t wanted = c.threads > 1 ? 4 * c.threads : 1;
  p.tile_blocks = max64(1, ceil_div(p.tiles, most));
  // Smaller blocks first, as long as the products' tiles are full; then ranges of output channels.
  if (p.tile_blocks < wanted) p.tile_blocks = max64(p.tile_blocks, min64(wanted, p.tiles / kDirectTile));
  p.per_task = ceil_div(p.tiles, p.tile_blocks);
  p.tile_blocks = max64(1, ceil_div(p.tiles, max64(1, p.per_task)));
  p.splits = min64(p.blocks, ceil_div(wanted, p.tile_blocks));
  p.splits = ceil_div(p.blocks, ceil_div(p.blocks, p.splits));
  p.v_point = (p.per_task * p.pixel * element / 64 | 1) * 64 / element;
  if (p.v_point < p.per_task * p.pixel) p.v_point += 128 / element;
  p.m_point = p.per_task * kDirectBlock + 16;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 64);
    return here;
  };
  p.cells = take(2 * points * static_cast<int64_t>(sizeof(void*)));
  p.zeros = take(padded * activation);
  p.prologue = take(points * kVectorBytes);
  p.list = take(p.per_task * static_cast<int64_t>(sizeof(WinogradTile)));
  p.v = take(points * p.v_point * element + kVectorBytes);
  p.m = take(points * p.m_point * 4);
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

// The inputs of one tile to V. cells: [2][points], scratch.
template <class F, Reads R, class T, class E>
void transform_input(const Conv& c, const WinogradPlan& p, const WinogradTile& t, const T** cells, const T* zeros, T* prologue, E* v) {
  const ConvShape& s = c.shape;
  const T* x = static_cast<const T*>(c.x) + t.image * s.height * s.width * s.in_channels;
  for (int r = 0; r < t.rows; ++r) {
    const int64_t row = t.row + r - s.pad_h;
    for (int q = 0; q < t.cols; ++q) {
      const int64_t col = t.col + q - s.pad_w;
      const bool inside = row >= 0 && row < s.height && col >= 0 && col < s.width;
      cells[r * t.cols + q] = inside ? x + (row * s.width + col) * s.in_channels : zeros;
    }
  }
  const int points = t.rows * t.cols;
  const T** gathered = cells + F::kIn * F::kIn;
  const int64_t whole = s.in_channels / kWidth;
  with_sides<F>(t.rows, t.cols, [&]<int rows, int cols>() {
    if (R == Reads::plain) input_tile<F, rows, cols, T>(cells, whole, v, p.v_point);
    int64_t i = R == Reads::plain ? whole : 0;
    if (i * kWidth == s.in_channels) return;
    for (int k = 0; k < points; ++k) gathered[k] = prologue + k * kWidth;
    for (; i < whole; ++i) {
      gather_cells<F, R, T, false>(c, cells, zeros, points, i * kWidth, prologue);
      input_tile<F, rows, cols, T>(gathered, 1, v + i * kWidth, p.v_point);
    }
    if (whole * kWidth == s.in_channels) return;
    gather_cells<F, R, T, true>(c, cells, zeros, points, i * kWidth, prologue);
    input_tile<F, rows, cols, T>(gathered, 1, v + i * kWidth, p.v_point);
  });
}

// The products at one point: tiles [first, last) of V and one block of weights, in pieces of equal size.
template <bool Pairs, class E>
FASTRES_INLINE void multiply_point(const WinogradPlan& p, const E* v, const float* u, int64_t first, int64_t last, float* m) {
  const int64_t offset = 0, pieces = ceil_div(last - first, kDirectTile);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t count = ceil_div(last - first, pieces - i);
    direct_any_tile<Pairs>(static_cast<int>(count), reinterpret_cast<const char*>(v + first * p.pixel),
                           p.pixel * static_cast<int64_t>(sizeof(E)), &offset, 1, p.words, u, m + first * kDirectBlock);
    first += count;
  }
}

// Whether a short side has point i of the full set.
template <class F>
FASTRES_INLINE bool has_point(int i, int side) {
  return i < side - 1 || i == F::kIn - 1;
}

template <class F, class T, bool Pairs>
void run_winograd(const Conv& c, int64_t begin, int64_t end, void* scratch) {
  using E = typename Product<Pairs>::Panel::Element;
  const ConvShape& s = c.shape;
  const WinogradPlan p = winograd_plan<F, Pairs>(c);
  char* base = static_cast<char*>(scratch);
  const T** cells = reinterpret_cast<const T**>(base + p.cells);
  T* zeros = reinterpret_cast<T*>(base + p.zeros);
  T* prologue = reinterpret_cast<T*>(base + p.prologue);
  E* v = reinterpret_cast<E*>(base + p.v);
  float* m = reinterpret_cast<float*>(base + p.m);
  WinogradList list{reinterpret_cast<WinogradTile*>(base + p.list), {}};
  __builtin_memset(zeros, 0, round_up(s.in_channels, kWidth) * sizeof(T));
  // The sides of the short tiles.
  const int short_rows = winograd_side<F>((p.rows - 1) * F::kOut, s.out_height);
  const int short_cols = winograd_side<F>((p.cols - 1) * F::kOut, s.out_width);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile_block = task % p.tile_blocks, split = task / p.tile_blocks;
    const int64_t first = tile_block * p.per_task, count = min64(p.per_task, p.tiles - first);
    list_tiles<F>(s, p, first, first + count, list);
    for (int64_t t = 0; t < count; ++t) {
      const WinogradTile& tile = list.tiles[t];
      switch (reads_of(c)) {
        case Reads::affine: transform_input<F, Reads::affine, T>(c, p, tile, cells, zeros, prologue, v + t * p.pixel); break;
        case Reads::affine_relu: transform_input<F, Reads::affine_relu, T>(c, p, tile, cells, zeros, prologue, v + t * p.pixel); break;
        default: transform_input<F, Reads::plain, T>(c, p, tile, cells, zeros, prologue, v + t * p.pixel);
      }
    }
    const int64_t per_split = ceil_div(p.blocks, p.splits);
    for (int64_t block = split * per_split; block < min64(p.blocks, (split + 1) * per_split); ++block) {
      const float* u = static_cast<const float*>(c.weights) + block * F::kIn * F::kIn * p.words * kDirectBlock;
      for (int r = 0; r < F::kIn; ++r) {
        for (int q = 0; q < F::kIn; ++q, u += p.words * kDirectBlock) {
          const bool all_rows = has_point<F>(r, short_rows), all_cols = has_point<F>(q, short_cols);
          const int64_t from = all_cols ? 0 : list.ends[0];
          const int64_t to = !all_rows ? list.ends[1] : all_cols ? count : list.ends[2];
          const int point = r * F::kIn + q;
          multiply_point<Pairs>(p, v + point * p.v_point, u, from, to, m + point * p.m_point);
        }
      }
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
                      [&]<int rows, int cols>() { output_tile<F, rows, cols>(m + t * kDirectBlock, p.m_point, out); });
      }
    }
  }
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
