// All kernels of scale_shift_act, to be compiled to PTX.
#include "csrc/cuda/launch_kernel.cuh"
#include "kernels/scale_shift_act/cuda_kernel.cuh"

namespace fastres::cuda {
template void launch<Pass::forward>(const PointProblem&, void*);
template void launch<Pass::backward>(const PointProblem&, void*);
template void launch<Pass::masked>(const PointProblem&, void*);
}  // namespace fastres::cuda
