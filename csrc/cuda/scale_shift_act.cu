// Compiled by nvcc, once for the forward and once for the backward (FASTRES_BACKWARD), so that both build side by side.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTRES_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#include "../../kernels/scale_shift_act/cuda_kernel.cuh"
#include "launch.h"

namespace fastres::cuda {
namespace {

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

template <bool Backward>
const char* run(const Problem& problem, int device, void* stream) {
  const OnDevice guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    launch<Backward>(problem, stream);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

#ifdef FASTRES_BACKWARD
const char* scale_shift_act_backward(const Problem& problem, int device, void* stream) { return run<true>(problem, device, stream); }
#else
const char* scale_shift_act(const Problem& problem, int device, void* stream) { return run<false>(problem, device, stream); }
#endif

}  // namespace fastres::cuda
