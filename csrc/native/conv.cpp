#include "conv.h"

#include <atomic>
#include <stdexcept>

#include <torch/csrc/stable/ops.h>

#include "memory.h"

namespace fastres {

namespace {

void* grown(Block& block, int64_t bytes) {
  if (block.bytes() < bytes) {
    block = Block();  // the old one goes first
    block = Block(bytes);
  }
  return block.get();
}

}  // namespace

void* thread_scratch(int64_t bytes) {
  static thread_local Block block;
  return grown(block, bytes);
}

void* weight_scratch(int64_t bytes) {
  static thread_local Block block;
  return grown(block, bytes);
}

const ConvKernel& find_conv(const Conv& conv, const std::string& name) {
  const ConvKernels& all = kernels().conv;
  std::string reasons, known;
  const ConvKernel* unsuited = nullptr;
  for (int64_t i = 0; i < all.count; ++i) {
    const ConvKernel& kernel = *all.list[i];
    known += (known.empty() ? "" : ", ") + std::string(kernel.name);
    if (!name.empty() && name != kernel.name) continue;
    const char* reason = kernel.refusal(conv);
    if (reason == nullptr) {
      if (!name.empty() || kernel.suits == nullptr || kernel.suits(conv)) return kernel;
      if (unsuited == nullptr) unsuited = &kernel;
      continue;
    }
    reasons += (reasons.empty() ? "" : "; ") + std::string(kernel.name) + ": " + reason;
  }
  if (unsuited != nullptr) return *unsuited;
  if (reasons.empty()) throw std::runtime_error("no convolution kernel is called '" + name + "'; this instruction set has " + known);
  throw std::runtime_error("no convolution kernel serves this problem (" + reasons + ")");
}

void pack_conv(const ConvKernel& kernel, const ConvShape& shape, bool bfloat16, const WeightView& weight, void* packed) {
  torch::stable::parallel_for(0, kernel.pack_items(shape, bfloat16), 1,
                              [&](int64_t begin, int64_t end) { kernel.pack(shape, bfloat16, weight, packed, begin, end); });
}

void run_conv(const ConvKernel& kernel, const Conv& conv) {
  const int64_t tasks = kernel.tasks(conv);
  const int64_t bytes = kernel.scratch_bytes(conv);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, min64(conv.threads, tasks), 1, [&](int64_t, int64_t) {
    void* scratch = nullptr;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      if (scratch == nullptr) scratch = thread_scratch(bytes);
      kernel.run(conv, task, task + 1, scratch);
    }
  });
}

}  // namespace fastres
