// The entries of scale_shift_act that tests/test_cuda_pointwise.py runs as PTX.
#include "csrc/cuda/launch_kernel.cuh"
#include "kernels/scale_shift_act/cuda_kernel.cuh"

namespace fastres::cuda {
template __global__ void forward_rows<BFloat, 8, Residual::affine>(PointProblem, int);
template __global__ void forward_planes<Half, 8, Residual::plain>(PointProblem, int);
template __global__ void backward_rows<Half, 8, Residual::affine, false>(PointProblem, int);
template __global__ void backward_rows<BFloat, 1, Residual::plain, true>(PointProblem, int);
template __global__ void backward_planes<float, 4, Residual::affine, false>(PointProblem, int);
template __global__ void add_parts<2>(PointProblem, int64_t);
template __global__ void add_parts<3>(PointProblem, int64_t);
}  // namespace fastres::cuda
