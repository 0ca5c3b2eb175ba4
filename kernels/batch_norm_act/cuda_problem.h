// What the CUDA kernels of batch_norm_act are given, and whether and how a problem fits on chip. Plain C++: no CUDA, no torch.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../common/cuda_types.h"

namespace fastres::cuda {

// What of a GPU decides whether a map fits.
struct Chip {
  int multiprocessors;
  int64_t shared_per_multiprocessor;  // bytes of shared memory
  int64_t shared_per_block;           // the most that one block may ask for
};

// How a problem is cut. The grid is (groups, parts); a block owns `across` vectors of channels side by side and `part_rows` rows.
struct NormPlan {
  int vector;  // V: elements of one access
  int across;  // vectors side by side: a power of two, at most a warp
  int groups;  // of across*V channels
  int parts;   // of the rows
  int64_t part_rows;
  int shared_items;  // vectors that a thread keeps in shared memory, of each kept map, beyond those in its registers
  int64_t shared_bytes;
};

// Maps are matrices [R, C], R = N*H*W. Pointers that a problem doesn't have are null.
struct NormProblem {
  Type type;
  bool relu;
  float eps;
  int64_t rows;  // R
  int channels;  // C
  NormPlan plan;
  const void* y;         // [R, C]
  const void* residual;  // [R, C], or null; in the backward pass for the mask only
  const float* weight;   // [C]
  const float* bias;     // [C]
  float* mean;           // [C]: written by the forward, read by the backward pass
  float* var;            // [C], as mean; biased
  void* out;             // [R, C]: forward only
  const void* grad;      // [R, C]: from here on backward only
  void* grad_y;          // [R, C]
  void* grad_residual;   // [R, C], or null: not wanted
  float* grad_weight;    // [C]
  float* grad_bias;      // [C]
  float* partial;        // [parts, 2, C]: both passes
  unsigned* arrived;     // [groups], 0 before the first launch; every launch leaves it as it may find it
};

constexpr int kNormThreads = 256;
constexpr int kNormBlocks = 2;     // resident on a multiprocessor: up to 128 registers a thread
constexpr int kForwardItems = 8;   // vectors of y that a thread keeps in registers
constexpr int kBackwardItems = 4;  // vectors of y and of dz
constexpr int kNormBytes = 32;     // a block's channels: a whole sector of memory
constexpr int64_t kThinnest = 2;   // vectors a thread: parts are not cut thinner

// Floats of the scratch space of a block's reductions: a padded row of threads for each of V channels, and their doubles later.
template <int V>
constexpr int kNormScratch = V * (kNormThreads + 1) > 2 * kNormThreads ? V * (kNormThreads + 1) : 2 * kNormThreads;
// Then four vectors of the block's channels, then the tile.
inline int64_t norm_fixed_bytes(int vector, int across) {
  const int scratch = vector == 8 ? kNormScratch<8> : vector == 4 ? kNormScratch<4> : kNormScratch<1>;
  return ceil_div((scratch + 4 * across * vector) * static_cast<int64_t>(sizeof(float)), 128) * 128;
}

// 16 bytes where every pointer is aligned to them and they never cross a row, else one element.
inline int vector_length(const NormProblem& p) {
  const int v = 16 / bytes_of(p.type);
  uintptr_t all = 0;
  for (const void* pointer : {p.y, p.residual, static_cast<const void*>(p.out), p.grad, static_cast<const void*>(p.grad_y),
                              static_cast<const void*>(p.grad_residual)}) {
    all |= reinterpret_cast<uintptr_t>(pointer);
  }
  return all % 16 == 0 && p.channels % v == 0 ? v : 1;
}

// Fills in `plan`. The result is null, or why the problem doesn't fit on this chip. rows and channels are at least 1.
inline const char* make_plan(const Chip& chip, bool backward, NormProblem* p) {
  NormPlan& plan = p->plan;
  const int bytes = bytes_of(p->type), blocks = chip.multiprocessors * kNormBlocks;
  plan.vector = vector_length(*p);
  plan.across = std::max(1, kNormBytes / (plan.vector * bytes));
  while (plan.across > 1 && plan.across / 2 * plan.vector >= p->channels) plan.across /= 2;
  const auto groups = [&] { return ceil_div(p->channels, static_cast<int64_t>(plan.across) * plan.vector); };
  while (plan.across < 32 && groups() > blocks) plan.across *= 2;
  if (groups() > blocks) return "it has more channels than the blocks of one launch can own";
  plan.groups = static_cast<int>(groups());
  const int64_t down = kNormThreads / plan.across;
  const int64_t most_parts = clamp(ceil_div(p->rows, down * kThinnest), 1, blocks / plan.groups);
  const int64_t items = ceil_div(ceil_div(p->rows, most_parts), down);
  plan.part_rows = items * down;
  plan.parts = static_cast<int>(ceil_div(p->rows, plan.part_rows));
  const int64_t in_shared = std::max<int64_t>(0, items - (backward ? kBackwardItems : kForwardItems));
  const int64_t item_bytes = static_cast<int64_t>(kNormThreads) * plan.vector * bytes * (backward ? 2 : 1);
  // CUDA keeps 1 KiB of every resident block's share.
  const int64_t room = std::min(chip.shared_per_block, chip.shared_per_multiprocessor / kNormBlocks - 1024);
  const int64_t fixed = norm_fixed_bytes(plan.vector, plan.across);
  if (in_shared > (room - fixed) / item_bytes) return "its map is larger than the registers and the shared memory of all multiprocessors";
  plan.shared_items = static_cast<int>(in_shared);
  plan.shared_bytes = fixed + in_shared * item_bytes;
  return nullptr;
}

}  // namespace fastres::cuda
