// Memory of a plan: large aligned blocks, packed weights that several plans share, and a pool of arenas.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "../native/conv.h"

namespace fastres {

// Why memory could not be had; MemoryError in Python.
class MemoryShortage : public std::bad_alloc {
 public:
  explicit MemoryShortage(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Uninitialised memory aligned to 64 bytes, or, from 2 MiB on, to 2 MiB and in huge pages where the system has them.
class Block {
 public:
  Block() = default;
  explicit Block(int64_t bytes);
  char* get() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> memory_;
  int64_t bytes_ = 0;
};

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
