// A convolution with its max-pool: some rows of the convolution are computed into a thread's scratch, where the pool reads them from the
// second cache. The rows two pieces share are computed twice.
#include <algorithm>

#include "plan.h"

namespace fastres {
namespace {

constexpr int64_t kRowsBytes = 512 << 10;  // of a piece's rows: a quarter of a second cache

struct Rows {
  int64_t first, last;
};

// Rows of the convolution under rows [first, last) of the pool.
Rows rows_under(const MapPool& p, int64_t first, int64_t last) {
  return {max64(0, first * p.stride_h - p.pad_h), min64(p.height, (last - 1) * p.stride_h - p.pad_h + (p.kernel_h - 1) * p.dilation_h + 1)};
}

Rows piece(const MapPool& p, int64_t chunks, int64_t chunk) { return {p.out_height * chunk / chunks, p.out_height * (chunk + 1) / chunks}; }

int64_t element_of(const Conv& c) { return c.bfloat16 ? 2 : 4; }

// The convolution that computes a piece's rows.
Conv part_of(const Work& w, Rows rows) {
  Conv c = w.conv;
  c.shape.images = 1;
  c.shape.out_height = rows.last - rows.first;
  c.threads = 1;
  c.part = true;
  c.first_row = rows.first;
  return c;
}

}  // namespace

int64_t pool_pieces(const Step& s, int64_t images, int threads, int64_t element) {
  const int64_t row = s.conv.out_width * s.conv.out_channels * element;
  int64_t chunks = 1;
  while (chunks < s.pool.out_height) {
    const Rows r = rows_under(s.pool, 0, ceil_div(s.pool.out_height, chunks));
    if ((r.last - r.first) * row <= kRowsBytes && images * chunks >= 2 * threads) break;
    ++chunks;
  }
  return threads > 1 ? min64(round_up(chunks, threads), s.pool.out_height) : chunks;
}

int64_t scratch_of(const Work& w) {
  const ConvKernel& kernel = w.step->weights->kernel();
  if (!w.step->pooled) return kernel.scratch_bytes(w.conv);
  int64_t scratch = 0, rows = 0;
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk) {
    const Rows p = piece(w.pool, w.chunks, chunk), r = rows_under(w.pool, p.first, p.last);
    scratch = max64(scratch, round_up(kernel.scratch_bytes(part_of(w, r)), 64));
    rows = max64(rows, r.last - r.first);
  }
  return scratch + rows * w.conv.shape.out_width * w.conv.shape.out_channels * element_of(w.conv) + 256;
}

void run_pooled(const Work& w, int64_t begin, int64_t end, void* scratch) {
  const ConvKernel& kernel = w.step->weights->kernel();
  const ConvShape& s = w.conv.shape;
  const int64_t element = element_of(w.conv), row = s.out_width * s.out_channels * element;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / w.chunks;
    const Rows p = piece(w.pool, w.chunks, task % w.chunks), r = rows_under(w.pool, p.first, p.last);
    Conv conv = part_of(w, r);
    const int64_t used = round_up(kernel.scratch_bytes(conv), 64);
    char* rows = static_cast<char*>(scratch) + used;
    conv.x = static_cast<const char*>(conv.x) + image * s.height * s.width * s.in_channels * element;
    conv.y = rows;
    kernel.run(conv, 0, kernel.tasks(conv), scratch);
    MapPool pool = w.pool;
    // As if the whole map were there: the pool's rows only look at those that are.
    pool.x = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(rows) - static_cast<uintptr_t>(r.first * row));
    pool.y = static_cast<char*>(pool.y) + image * pool.out_height * pool.out_width * pool.channels * element;
    const int64_t per_row = pool_chunks(pool);
    kernels().map_max_pool(pool, p.first * per_row, p.last * per_row);
  }
}

// A max-pool that alone reads what the convolution before it makes goes with that convolution, where its kernel can compute single rows.
void Plan::merge_pools() {
  const auto readers = [&](int value) {
    int64_t n = value == source_[output_];
    for (const Step& s : steps_) n += (s.input >= 0 && source_[s.input] == value) + (s.residual >= 0 && source_[s.residual] == value);
    return n;
  };
  for (size_t i = 1; i < steps_.size(); ++i) {
    Step& conv = steps_[i - 1];
    const Step& pool = steps_[i];
    if (pool.kind != StepKind::max_pool || conv.kind != StepKind::convolution || conv.pooled || conv.linear || conv.residual >= 0) continue;
    if (pool.input != conv.output || readers(conv.output) != 1) continue;
    Conv part{};
    part.shape = conv.conv;
    part.bfloat16 = options_.bfloat16;
    part.part = true;
    if (conv.weights->kernel().refusal(part) != nullptr) continue;
    conv.pooled = true;
    conv.pool = pool.pool;
    conv.output = pool.output;
    conv.name += " + " + pool.name;
    steps_.erase(steps_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

}  // namespace fastres
