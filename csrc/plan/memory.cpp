#include "memory.h"

namespace fastres {

PackedWeights::PackedWeights(const std::string& kernel, const ConvShape& shape, bool bfloat16, const float* weight)
    : shape_(shape), bfloat16_(bfloat16) {
  Conv conv{};
  conv.shape = shape;
  conv.bfloat16 = bfloat16;
  conv.threads = 1;
  kernel_ = &find_conv(conv, kernel);
  memory_ = Block(kernel_->packed_bytes(shape, bfloat16) + 256);
  pack_conv(*kernel_, shape, bfloat16, contiguous_weights(shape, weight), memory_.get());
}

bool PackedWeights::serves(const ConvKernel& kernel, const ConvShape& s, bool bfloat16) const {
  return &kernel == kernel_ && bfloat16 == bfloat16_ && s.in_channels == shape_.in_channels && s.out_channels == shape_.out_channels &&
         s.kernel_h == shape_.kernel_h && s.kernel_w == shape_.kernel_w && s.groups == shape_.groups;
}

int64_t ArenaPool::count() const {
  const std::lock_guard lock(mutex_);
  return count_;
}

int64_t ArenaPool::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

Block ArenaPool::take(int64_t bytes) {
  if (limit_ > 0 && bytes > limit_) {
    throw MemoryShortage("the plan needs an arena of " + mebibytes(bytes) + ", the limit is " + mebibytes(limit_));
  }
  {
    const std::lock_guard lock(mutex_);
    while (!free_.empty()) {
      Block block = std::move(free_.back());
      free_.pop_back();
      if (block.bytes() >= bytes) return block;
      --count_;  // made for fewer threads
      bytes_ -= block.bytes();
    }
  }
  Block block(bytes);
  const std::lock_guard lock(mutex_);
  free_.reserve(static_cast<size_t>(count_ + 1));  // giving back must not fail
  ++count_;
  bytes_ += block.bytes();
  return block;
}

void ArenaPool::give(Block block) noexcept {
  const std::lock_guard lock(mutex_);
  free_.push_back(std::move(block));
}

}  // namespace fastres
