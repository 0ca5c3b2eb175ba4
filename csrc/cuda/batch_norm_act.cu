#include "launch_kernel.cuh"
//
#include "../../kernels/batch_norm_act/cuda_kernel.cuh"
#include "launch.h"

namespace fastres::cuda {

const char* batch_norm_act(const NormProblem& problem, bool backward, int device, void* stream) {
  return with_errors(device, [&] { backward ? launch_norm<true>(problem, stream) : launch_norm<false>(problem, stream); });
}

const char* chip_of(int device, Chip* chip) {
  int figures[3] = {};
  const cudaDeviceAttr wanted[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin};
  for (int i = 0; i < 3; ++i) {
    const cudaError_t error = cudaDeviceGetAttribute(&figures[i], wanted[i], device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  *chip = {figures[0], figures[1], figures[2]};
  return nullptr;
}

}  // namespace fastres::cuda
