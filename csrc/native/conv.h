// Running a convolution of the engine (kernels/conv) on torch's thread pool.
#pragma once

#include <string>

#include "cpu.h"

namespace fastres {

// This thread's scratch of at least so many bytes, kept until the thread ends: fresh memory would be paged in at every call.
void* thread_scratch(int64_t bytes);
// The same for packed weights, on the thread that calls an operator.
void* weight_scratch(int64_t bytes);

// The kernel of that name, or, for an empty name, the preferred one. Throws std::runtime_error with every kernel's reason if none serves.
const ConvKernel& find_conv(const Conv& conv, const std::string& name = "");

// Packs the weights on all threads into packed_bytes bytes at `packed`.
void pack_conv(const ConvKernel& kernel, const ConvShape& shape, bool bfloat16, const WeightView& weight, void* packed);

// Runs all tasks on up to conv.threads threads of torch's pool.
void run_conv(const ConvKernel& kernel, const Conv& conv);

}  // namespace fastres
