// The CUDA kernels of batch_norm_act as a C library, for tests/test_cuda_batch_norm_act.py.
#include "cuda_emulation.h"

#include "../../kernels/batch_norm_act/cuda_kernel.cuh"

extern "C" {

void forward(const fastres::cuda::NormProblem* p) { fastres::cuda::launch_norm<false>(*p, nullptr); }
void backward(const fastres::cuda::NormProblem* p) { fastres::cuda::launch_norm<true>(*p, nullptr); }
// Fills in the plan; null, or why there is none.
const char* make_plan(const fastres::cuda::Chip* chip, int backward, fastres::cuda::NormProblem* p) {
  return fastres::cuda::make_plan(*chip, backward != 0, p);
}
uint64_t problem_size() { return sizeof(fastres::cuda::NormProblem); }
}
