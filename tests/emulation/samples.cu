// The sample kernels for the PTX interpreter: tests/test_cuda_emulation.py.
#include "csrc/cuda/launch_kernel.cuh"
#include "gemm.cuh"
#include "reductions.cuh"

namespace samples {
template __global__ void gemm<fastres::cuda::Half>(Gemm<fastres::cuda::Half>);
template __global__ void gemm<fastres::cuda::BFloat>(Gemm<fastres::cuda::BFloat>);
template __global__ void gemm<float>(Gemm<float>);
}  // namespace samples
