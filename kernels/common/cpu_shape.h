// How a [N, C, H, W] tensor is cut into pieces of work. The cut depends on the shape only, never on the number of threads or on the
// instruction set: that is what makes every sum the same whatever runs it.
//
// channels_last is a matrix of `rows` = N*H*W by C. Contiguous is N*C planes of `plane` = H*W elements.
//   part   what one set of partial sums covers: a range of rows (all channels), or one range of positions in the planes of one image
//   item   what one call of a kernel works on: a part, or (contiguous) one channel of a part
#pragma once

#include <stdint.h>

namespace fastres {

struct Shape {
  int64_t images;    // N
  int64_t channels;  // C
  int64_t height;    // H
  int64_t width;     // W
  bool planes;       // contiguous (true) or channels_last (false)
};

// About 128 KiB of float: a part stays in the second-level cache between two passes over it.
constexpr int64_t kPartElements = 32768;
constexpr int64_t kMinPartRows = 32;
constexpr int64_t kMaxPartRows = 1024;  // each lane adds up this many float values before double takes over
constexpr int64_t kPieceElements = 16384;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t plane_of(const Shape& s) { return s.height * s.width; }
static inline int64_t rows_of(const Shape& s) { return s.images * plane_of(s); }
static inline int64_t rows_per_part(const Shape& s) {
  return min64(kMaxPartRows, max64(kMinPartRows, kPartElements / max64(1, s.channels)));
}
static inline int64_t pieces_of(const Shape& s) { return ceil_div(plane_of(s), kPieceElements); }

static inline int64_t parts_of(const Shape& s) { return s.planes ? s.images * pieces_of(s) : ceil_div(rows_of(s), rows_per_part(s)); }
static inline int64_t items_of(const Shape& s) { return s.planes ? parts_of(s) * s.channels : parts_of(s); }

// Positions (rows, or elements of one plane) that part `part` covers.
static inline int64_t positions_of_part(const Shape& s, int64_t part) {
  if (!s.planes) return min64(rows_per_part(s), rows_of(s) - part * rows_per_part(s));
  return min64(kPieceElements, plane_of(s) - part % pieces_of(s) * kPieceElements);
}

// Elements of an item, for choosing how many items make a task.
static inline int64_t elements_of_item(const Shape& s) {
  return s.planes ? min64(kPieceElements, plane_of(s)) : rows_per_part(s) * s.channels;
}

}  // namespace fastres
