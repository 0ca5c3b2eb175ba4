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

#include "cpu_winograd_plan.h"

namespace fastres::FASTRES_ISA {

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

// The products at one point: tiles [first, last) of V and one block of weights, in pieces of equal size.
template <bool Pairs, class E>
FASTRES_INLINE void multiply_point(const WinogradPlan& p, const E* v, int64_t words, const float* u, int64_t first, int64_t last,
                                   bool start, float* m) {
  const int64_t pieces = ceil_div(last - first, kDirectTile), step = pieces == 0 ? 0 : ceil_div(kDirectBlock, pieces);
  const float* next = u + p.words * kDirectBlock;
  static constexpr int64_t kNoOffset = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t count = ceil_div(last - first, pieces - i);
    for (int64_t k = 0; k < words; k += kWinogradChain) {
      const int64_t n = min64(kWinogradChain, words - k);
      product_of<Pairs, true>(count, {reinterpret_cast<const char*>(v + first * p.pixel) + 4 * k, p.pixel * static_cast<int64_t>(sizeof(E)),
                                      &kNoOffset, 1, n, u + k * kDirectBlock, m + first * kDirectBlock, start && k == 0, next, step});
      next += step * n;
    }
    first += count;
  }
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
  if (c.part) return "parts of the output";
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

// With few tiles the transformed weights, several times the others, are read for too few products.
template <int64_t Size>
bool winograd_suits(const Conv& c) {
  constexpr int64_t kFewTiles = 32;
  const ConvShape& s = c.shape;
  return !c.packed_for_one && s.images * ceil_div(s.out_height, Size) * ceil_div(s.out_width, Size) >= kFewTiles;
}

static const ConvKernel winograd4 = {
    "winograd4",      winograd4_refusal,        Winograd4::packed_bytes, Winograd4::pack_items,
    Winograd4::pack,  Winograd4::scratch_bytes, Winograd4::tasks,        run_winograd<WinogradTile4, float, false>,
    winograd_suits<4>};
static const ConvKernel winograd2 = {
    "winograd2",      winograd2_refusal,        Winograd2::packed_bytes, Winograd2::pack_items,
    Winograd2::pack,  Winograd2::scratch_bytes, Winograd2::tasks,        run_winograd<WinogradTile2, bf16, kMultipliesPairs>,
    winograd_suits<2>};

}  // namespace fastres::FASTRES_ISA
