// Memory of a plan: packed weights that several plans share, and a pool of arenas.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "../native/conv.h"
#include "../native/memory.h"

namespace fastres {

// Weights of one convolution, packed by one kernel. Immutable, so that any number of plans and threads may read them.
class PackedWeights {
 public:
  // weight: float [K, C/groups, R, S] of `shape`. Packs on all threads.
  PackedWeights(const std::string& kernel, const ConvShape& shape, bool bfloat16, const float* weight);
  const ConvKernel& kernel() const { return *kernel_; }
  bool serves(const ConvKernel& kernel, const ConvShape& shape, bool bfloat16) const;
  const void* data() const { return memory_.get(); }
  int64_t bytes() const { return memory_.bytes(); }

 private:
  const ConvKernel* kernel_;
  ConvShape shape_;
  bool bfloat16_;
  Block memory_;
};

// Arenas that are not in use, for the next call. A call takes one and gives it back, so there are as many as calls at one time.
class ArenaPool {
 public:
  explicit ArenaPool(int64_t limit) : limit_(limit) {}

  class Lease {
   public:
    Lease(ArenaPool& pool, int64_t bytes) : pool_(pool), block_(pool.take(bytes)) {}
    ~Lease() { pool_.give(std::move(block_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    char* get() const { return block_.get(); }

   private:
    ArenaPool& pool_;
    Block block_;
  };

  int64_t count() const;  // arenas that exist, in use or not
  int64_t bytes() const;  // of all of them

 private:
  Block take(int64_t bytes);
  void give(Block block) noexcept;

  const int64_t limit_;  // bytes of one arena; 0: none
  mutable std::mutex mutex_;
  std::vector<Block> free_;
  int64_t count_ = 0, bytes_ = 0;
};

}  // namespace fastres
