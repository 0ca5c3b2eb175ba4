// How a direct convolution is cut: the panel (a band of input rows, packed for one thread), the runs of K that a multiply-add loop walks,
// the tiles of output positions, and the tasks.
//
// Panel. A task packs the input rows of its band once, with the prologue applied and the padding written as zeros, and then needs no
// border logic: output position v = row*pitch + column reads the panel at v*pixel + offset[run], for every tap. A strided convolution is
// packed in phases (rows and columns by their remainder modulo the stride), so neighbours in v stay neighbours in memory. With stride 1,
// the padding on the right of one row is that on the left of the next: pitch = W + pad. Positions beyond a row's end are computed where a
// tile spans two rows, and not stored.
// Convolutions of few channels are packed by columns instead (im2col): one row of R*S*C elements for each output position. Or their
// positions overlap: a run is the S*C neighbouring elements of one row of taps, and the next position's run starts stride*C elements
// later, in the same padded row of x. Nothing is copied more than once, and the runs' padding reads what comes next in the row.
// 1x1 convolutions without padding and stride are one long row of N*H*W positions.
#pragma once

#include "../common/cpu_shape.h"
#include "../common/cpu_vec.h"
#include "cpu_conv.h"

namespace fastres::FASTRES_ISA {

// What a kernel wants of its panel.
struct PanelFormat {
  int64_t element;     // bytes of one element
  int64_t planes;      // copies (bf16x3: hi, mid, lo and the non-finite values)
  int64_t unit;        // runs are zero-padded to multiples of this many elements
  int64_t columns_to;  // convolutions of up to so many channels are packed by columns
  bool overlaps;       // or with overlapping positions, where that costs at most half more products
  int64_t budget;      // bytes of panel a task may fill
  int64_t tile;        // positions a tile holds at most
  bool spans_rows;     // tiles may span rows (junk positions cost nothing extra)
  int64_t block;       // output channels a block of weights holds
  bool in_place;       // x itself may be the panel
  int64_t chunk[2];    // channels that are packed and summed at a time: 1x1 convolutions, others (0: all)
};

struct Geometry {
  ConvShape s;  // as given; flat ones with P = N*H*W rows of one position, images = 1
  PanelFormat format;
  bool in_place, columns, overlap;
  bool spans;             // tiles may span rows
  int64_t chunk, chunks;  // channels go in so many chunks, so that a panel and the weights that meet it stay in the second cache
  int64_t runs, run;      // runs of K and their padded length, in elements, for one chunk
  int64_t pixel;          // elements from one position to the next
  int64_t pitch;          // positions from one row to the next
  int64_t phases_h, phases_w, extra_h;
  int64_t blocks;         // of output channels
  int64_t first_row;      // output row that is row 0 of all bands
  int64_t rows, images;   // of a band: some rows of one image, or some whole images
  int64_t bands, splits;  // tasks = bands * splits; a split is a range of blocks
};

struct Band {
  int64_t image, images, row, rows;  // output rows [row, row + rows) of images [image, image + images)
  int64_t first_block, last_block;
};

// Output channels of a task's stats row etc. never depend on the split: every task has a full row.
FASTRES_INLINE int64_t tasks_of(const Geometry& g) { return g.bands * g.splits; }

FASTRES_INLINE int64_t panel_rows(const Geometry& g, int64_t rows) { return rows + g.extra_h; }

// Positions of one phase of a band's panel.
FASTRES_INLINE int64_t phase_positions(const Geometry& g, int64_t images, int64_t rows) { return images * panel_rows(g, rows) * g.pitch; }

// Elements behind the last position that whole tiles read, as junk that must be finite.
FASTRES_INLINE int64_t tail_elements(const Geometry& g) {
  const int64_t reach = g.overlap ? 0 : (g.s.kernel_w - 1) * g.s.dilation_w + g.s.pad_w;
  return (g.format.tile + reach + 1) * g.pixel + (g.overlap ? g.run : 0);
}

// Elements of one plane of a band's panel, with slack for the taps past the last position and for whole-tile reads.
FASTRES_INLINE int64_t plane_elements(const Geometry& g, int64_t images, int64_t rows) {
  const int64_t slack = tail_elements(g);
  const int64_t n =
      g.columns ? images * rows * g.s.out_width * g.pixel : g.phases_h * g.phases_w * phase_positions(g, images, rows) * g.pixel;
  return round_up(n + slack + 32, 32) + 32;  // an odd number of cache lines from plane to plane
}

// Bytes of the row buffer that packing by columns copies from: input rows of the band with their padding.
FASTRES_INLINE int64_t row_buffer_width(const Geometry& g) { return round_up((g.s.width + 2 * g.s.pad_w) * g.s.in_channels + 64, 32); }
FASTRES_INLINE int64_t row_buffer_rows(const Geometry& g, int64_t rows) {
  return (rows - 1) * g.s.stride_h + (g.s.kernel_h - 1) * g.s.dilation_h + 1;
}
FASTRES_INLINE int64_t row_buffer_elements(const Geometry& g, int64_t rows) {
  return g.columns ? row_buffer_rows(g, rows) * row_buffer_width(g) : 0;
}

FASTRES_INLINE int64_t panel_bytes(const Geometry& g, int64_t images, int64_t rows, int64_t planes) {
  if (g.in_place) return 0;
  return (plane_elements(g, images, rows) + row_buffer_elements(g, rows)) * planes * g.format.element;
}

// What a panel keeps in the cache: the plane of non-finite values is not touched as a rule.
FASTRES_INLINE int64_t panel_cached(const Geometry& g, int64_t images, int64_t rows) {
  return panel_bytes(g, images, rows, min64(g.format.planes, 3));
}

// The most tiles a band can be cut into.
FASTRES_INLINE int64_t most_tiles(const Geometry& g) {
  return g.images * (g.spans ? ceil_div(g.rows * g.pitch, g.format.tile) + 1 : g.rows * ceil_div(g.s.out_width, g.format.tile));
}

FASTRES_INLINE bool is_flat(const ConvShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
}

// Rows and images of a band: as large as the panel's budget allows, yet enough bands to go round the threads. Where one image is too small
// to fill them, the blocks of output channels are split as well, and each split packs its own panel.
FASTRES_INLINE void cut_into_bands(Geometry& g, int threads, int64_t weight_bytes, bool sums) {
  const ConvShape& s = g.s;
  const int64_t P = s.out_height, N = s.images;
  const int64_t whole = g.in_place ? N * P * s.in_channels * g.format.element : panel_cached(g, N, P);
  if (!sums && threads > 1 && whole <= g.format.budget && weight_bytes >= 2 * whole && g.blocks >= threads) {
    // Threads share the weights, which are what there is to read; each packs the same panel. (Not where a task sums over positions: a chain
    // of sums over all of them loses digits.)
    g.rows = P;
    g.images = N;
    g.bands = 1;
    g.splits = g.blocks % threads == 0 ? threads : min64(g.blocks, 2 * threads);
    return;
  }
  // Many tasks cost repeated reads of the weights; few leave threads waiting for the last one.
  const int64_t wanted = threads <= 1 ? 1 : threads * (weight_bytes > (int64_t{3} << 20) ? 1 : 4);
  const int64_t unit = is_flat(s) ? g.format.tile * 2 : 1;  // rows come in pairs of tiles where a row is one position
  int64_t rows = P;
  while (rows > unit && panel_cached(g, 1, rows) > g.format.budget) rows = round_up(ceil_div(rows, 2), unit);
  if (is_flat(s) && g.in_place) rows = min64(rows, 1024);
  if (N * ceil_div(P, rows) < wanted) {
    const int64_t by_rows = max64(unit, round_up(ceil_div(N * P, wanted), unit));
    rows = min64(rows, max64(by_rows, is_flat(s) ? 4 * g.format.tile : ceil_div(2 * g.format.tile, s.out_width)));
  }
  rows = round_up(ceil_div(P, ceil_div(P, rows)), unit);  // equal bands
  rows = min64(rows, P);
  int64_t images = 1;
  if (rows == P) {
    while (images * 2 <= N && ceil_div(N, images * 2) >= wanted && panel_cached(g, images * 2, rows) <= g.format.budget) images *= 2;
  }
  g.rows = rows;
  g.images = images;
  g.bands = ceil_div(N, images) * ceil_div(P, rows);
  g.splits = 1;
  while (g.bands * g.splits < threads * 2 && ceil_div(g.blocks, g.splits * 2) >= 2) g.splits *= 2;
}

FASTRES_INLINE Geometry geometry_of(const Conv& c, const PanelFormat& format) {
  Geometry g{};
  g.s = c.shape;
  ConvShape& s = g.s;
  g.format = format;
  g.first_row = c.part ? c.first_row : 0;
  const bool flat = is_flat(s);
  if (flat) {
    s.height = s.out_height = s.images * s.height * s.width;
    s.images = s.width = s.out_width = 1;
  }
  g.blocks = ceil_div(s.out_channels, format.block);
  const bool few = s.kernel_h * s.kernel_w > 1 && s.in_channels <= format.columns_to;
  const int64_t row_run = round_up(s.kernel_w * s.in_channels, format.unit);
  g.overlap = few && format.overlaps && s.dilation_w == 1 &&
              2 * s.kernel_h * row_run <= 3 * round_up(s.kernel_h * s.kernel_w * s.in_channels, format.unit);
  g.columns = few && !g.overlap;
  const int64_t limit = format.chunk[s.kernel_h * s.kernel_w > 1];
  g.chunks = limit > 0 && !few ? max64(1, ceil_div(s.in_channels, limit)) : 1;
  g.chunk = g.chunks > 1 ? round_up(ceil_div(s.in_channels, g.chunks), format.unit) : s.in_channels;
  if (g.columns) {
    g.runs = 1;
    g.run = round_up(s.kernel_h * s.kernel_w * s.in_channels, format.unit);
    g.pixel = g.run + (g.run % 128 == 0 ? format.unit : 0);
    g.pitch = s.out_width;
    g.phases_h = g.phases_w = 1;
  } else if (g.overlap) {
    g.runs = s.kernel_h;
    g.run = row_run;
    g.pixel = s.stride_w * s.in_channels;
    const int64_t row = max64((s.width + 2 * s.pad_w) * s.in_channels, (s.out_width - 1) * g.pixel + g.run);
    g.pitch = ceil_div(row, g.pixel);
    g.phases_h = min64(s.stride_h, (s.kernel_h - 1) * s.dilation_h + 1);
    g.phases_w = 1;
    g.extra_h = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
  } else {
    g.runs = s.kernel_h * s.kernel_w;
    g.run = round_up(g.chunk, format.unit);
    // Whole tiles are read where tiles may span rows: a smaller x has to be copied.
    const bool enough = !format.spans_rows || s.out_height >= format.tile;
    g.in_place = flat && enough && format.in_place && s.in_channels % format.unit == 0 && c.scale == nullptr && c.offset == nullptr;
    // Rows of a tile a multiple of 256 bytes apart would share few sets of the first cache.
    const bool aliased = g.run * format.element % 256 == 0;
    g.pixel = g.in_place ? s.in_channels : g.run + (aliased ? 64 / format.element : 0);
    g.phases_h = min64(s.stride_h, (s.kernel_h - 1) * s.dilation_h + 1);
    g.phases_w = min64(s.stride_w, (s.kernel_w - 1) * s.dilation_w + 1);
    g.extra_h = (s.kernel_h - 1) * s.dilation_h / s.stride_h;
    const int64_t reach = (s.kernel_w - 1) * s.dilation_w / s.stride_w;
    const bool shared = s.stride_w == 1 && s.out_width <= s.width + s.pad_w;
    g.pitch = shared ? s.width + s.pad_w : s.out_width + reach;
  }
  g.spans = g.pitch == s.out_width || (format.spans_rows && !(g.overlap && s.out_width % format.tile == 0));
  const int64_t weights = g.blocks * format.block * g.chunks * g.runs * g.run * format.element * min64(format.planes, 3);
  cut_into_bands(g, c.threads, weights, c.stats != nullptr || c.pre != nullptr);
  return g;
}

FASTRES_INLINE Band band_of(const Geometry& g, int64_t task) {
  const int64_t band = task / g.splits, split = task % g.splits;
  const int64_t per_image = ceil_div(g.s.out_height, g.rows);
  Band b;
  b.image = band / per_image * g.images;
  b.images = min64(g.images, g.s.images - b.image);
  b.row = band % per_image * g.rows;
  b.rows = min64(g.rows, g.s.out_height - b.row);
  b.first_block = g.blocks * split / g.splits;
  b.last_block = g.blocks * (split + 1) / g.splits;
  return b;
}

// Channels [first, last) of chunk i, and the elements of K that its runs hold.
FASTRES_INLINE int64_t chunk_first(const Geometry& g, int64_t i) { return i * g.chunk; }
FASTRES_INLINE int64_t chunk_last(const Geometry& g, int64_t i) { return min64((i + 1) * g.chunk, g.s.in_channels); }
FASTRES_INLINE int64_t chunk_run(const Geometry& g, int64_t i) {
  return g.columns || g.overlap ? g.run : round_up(chunk_last(g, i) - chunk_first(g, i), g.format.unit);
}

// Where run (r, s) starts in the panel of a band, in elements.
FASTRES_INLINE int64_t run_offset(const Geometry& g, const Band& b, int64_t run) {
  if (g.columns) return 0;
  if (g.overlap) {
    const int64_t h = run * g.s.dilation_h;
    return (h % g.s.stride_h * phase_positions(g, b.images, b.rows) + h / g.s.stride_h * g.pitch) * g.pixel;
  }
  const int64_t h = run / g.s.kernel_w * g.s.dilation_h, w = run % g.s.kernel_w * g.s.dilation_w;
  const int64_t phase = h % g.s.stride_h * g.phases_w + w % g.s.stride_w;
  return (phase * phase_positions(g, b.images, b.rows) + h / g.s.stride_h * g.pitch + w / g.s.stride_w) * g.pixel;
}

// A tile: positions [v, v + count) of the panel. Position j goes to output pixel out[j] (an index into [N, P, Q]), or nowhere (-1).
constexpr int64_t kMostTile = 16;
struct Tile {
  int64_t v;
  int32_t count;
  int32_t stored;  // how many of out[] are >= 0
  int64_t out[kMostTile];
};

// Cuts a band into tiles; returns how many.
FASTRES_INLINE int64_t cut_into_tiles(const Geometry& g, const Band& b, Tile* tiles) {
  const int64_t Q = g.s.out_width, P = g.s.out_height, M = g.format.tile;
  const bool spans = g.spans;
  int64_t n = 0;
  for (int64_t i = 0; i < b.images; ++i) {
    const int64_t base = g.columns ? i * b.rows * Q : i * panel_rows(g, b.rows) * g.pitch;
    const int64_t pixels = ((b.image + i) * P + b.row) * Q;
    int64_t row = 0, column = 0;
    while (row < b.rows) {
      Tile& t = tiles[n++];
      t.v = base + row * g.pitch + column;
      t.count = t.stored = 0;
      // Rows are cut evenly where tiles stay inside them: 15 positions are 8 + 7, not 14 + 1.
      const int64_t most = spans ? M : ceil_div(Q, ceil_div(Q, M));
      while (t.count < most && row < b.rows) {
        const bool valid = column < Q;
        t.out[t.count] = valid ? pixels + row * Q + column : -1;
        t.stored += valid;
        ++t.count;
        if (++column >= (spans ? g.pitch : Q)) {
          column = 0;
          ++row;
          if (!spans) break;
        }
      }
      while (t.count > 0 && t.out[t.count - 1] < 0) --t.count;
      if (column >= Q) {  // a tile never starts on junk
        column = 0;
        ++row;
      }
      for (int64_t j = t.count; j < kMostTile; ++j) t.out[j] = -1;
    }
  }
  return n;
}

}  // namespace fastres::FASTRES_ISA
