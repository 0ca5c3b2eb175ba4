// The sample kernels as a C library, for tests/test_cuda_emulation.py.
#include "cuda_emulation.h"

#include "gemm.cuh"
#include "reductions.cuh"

using namespace samples;
using fastres::cuda::BFloat;
using fastres::cuda::Half;

extern "C" {

void gemm_half(const Gemm<Half>* p) { launch_gemm(*p, nullptr); }
void gemm_bfloat(const Gemm<BFloat>* p) { launch_gemm(*p, nullptr); }
void gemm_float(const Gemm<float>* p) { launch_gemm(*p, nullptr); }
void run_block_sums(const Sums* p) { launch_block_sums(*p, nullptr); }
void run_warp_sums(const Sums* p) { launch_warp_sums(*p, nullptr); }
void run_fused_sums(const Sums* p) { launch_fused_sums(*p, nullptr); }
void run_grid_sum(const Sums* p) { launch_grid_sum<false>(*p, nullptr); }
void run_grid_sum_static(const Sums* p) { launch_grid_sum<true>(*p, nullptr); }
uint64_t gemm_size() { return sizeof(Gemm<float>); }
uint64_t sums_size() { return sizeof(Sums); }

// The half conversions of intrinsics.h, for every number.
void to_floats(const uint16_t* bits, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __half2float(__ushort_as_half(bits[i]));
}
void to_halves(const float* x, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __half_as_ushort(__float2half_rn(x[i]));
}
}
