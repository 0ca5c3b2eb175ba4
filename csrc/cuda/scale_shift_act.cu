#include "launch_kernel.cuh"
//
#include "../../kernels/scale_shift_act/cuda_kernel.cuh"
#include "launch.h"

namespace fastres::cuda {

const char* scale_shift_act(const PointProblem& problem, int device, void* stream) {
  return with_errors(device, [&] { launch<Pass::forward>(problem, stream); });
}

}  // namespace fastres::cuda
