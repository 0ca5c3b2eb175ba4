// The sample kernels as a C library, for tests/test_cuda_emulation.py.
#include "cuda_emulation.h"

#include "gemm.cuh"

extern "C" {

void gemm_half(const samples::Gemm<fastres::cuda::Half>* p) { samples::launch_gemm(*p, nullptr); }
void gemm_bfloat(const samples::Gemm<fastres::cuda::BFloat>* p) { samples::launch_gemm(*p, nullptr); }
void gemm_float(const samples::Gemm<float>* p) { samples::launch_gemm(*p, nullptr); }
}
