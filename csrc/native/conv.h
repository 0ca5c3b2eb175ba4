// Running a convolution of the engine (kernels/conv) on torch's thread pool.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "cpu.h"

namespace fastres {

// Memory aligned to 64 bytes, uninitialised. Throws std::bad_alloc.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes);
  void* get() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

// This thread's scratch of at least so many bytes, kept until the thread ends: fresh memory would be paged in at every call.
void* thread_scratch(size_t bytes);
// The same for packed weights, on the thread that calls an operator.
void* weight_scratch(size_t bytes);

// The kernel of that name, or, for an empty name, the preferred one. Throws std::runtime_error with every kernel's reason if none serves.
const ConvKernel& find_conv(const Conv& conv, const std::string& name = "");

// Packs the weights on all threads into packed_bytes bytes at `packed`.
void pack_conv(const ConvKernel& kernel, const ConvShape& shape, bool bfloat16, const WeightView& weight, void* packed);

// Runs all tasks on up to conv.threads threads of torch's pool.
void run_conv(const ConvKernel& kernel, const Conv& conv);

}  // namespace fastres
