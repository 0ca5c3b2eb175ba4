// How the kernels' host code queues launches when nvcc compiles it, and how errors come back. Include it before any cuda_kernel.cuh:
//
//   FASTRES_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)
//   FASTRES_LAUNCH_COOPERATIVE(...)   the same; all blocks are resident at once, or the launch fails
//
// tests/emulation/cuda_emulation.h defines the same macros for g++. Parentheses around a kernel with commas in its template arguments.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#define FASTRES_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  fastres::cuda::queue_kernel<false>(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define FASTRES_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  fastres::cuda::queue_kernel<true>(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace fastres::cuda {

constexpr size_t kSharedWithoutAsking = 48 << 10;  // bytes of dynamic shared memory that any kernel may have

// Errors stay where cudaGetLastError finds them: with_errors() asks once after all launches of a problem.
template <bool Cooperative, class... Parameters>
void queue_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                  std::type_identity_t<Parameters>... arguments) {
  if (shared_bytes > kSharedWithoutAsking &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)) != cudaSuccess) {
    return;
  }
  // All blocks have to be resident: as much of the first cache as possible is shared memory.
  if (Cooperative && shared_bytes > 0 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
    return;
  }
  void* pointers[] = {static_cast<void*>(&arguments)...};
  const auto on = static_cast<cudaStream_t>(stream);
  if constexpr (Cooperative) {
    cudaLaunchCooperativeKernel(kernel, grid, block, pointers, shared_bytes, on);
  } else {
    cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, on);
  }
}

// This library has a CUDA runtime of its own (static), whose current device torch's guard doesn't promise to set.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// Runs `queue()`, which queues kernels, with `device` current. Null, or CUDA's words for what went wrong.
template <class Queue>
const char* with_errors(int device, Queue queue) {
  const OnDevice guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    queue();
    error = cudaGetLastError();
  } else {
    cudaGetLastError();  // or the next call would find it again
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastres::cuda
