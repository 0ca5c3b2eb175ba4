// The CUDA kernels of scale_shift_act as a plain C library, for tests/test_cuda_emulation.py.
#include "cuda_emulation.h"

#include "../../kernels/scale_shift_act/cuda_kernel.cuh"

extern "C" {

// Runs the forward, or with `backward` the backward. `reversed`: the threads of a block run last to first.
void run(const fastres::cuda::Problem* problem, int backward, int reversed) {
  emulation::reversed = reversed != 0;
  backward ? fastres::cuda::launch<true>(*problem, nullptr) : fastres::cuda::launch<false>(*problem, nullptr);
}

int64_t partial_size(const fastres::cuda::Problem* problem) {
  return fastres::cuda::parts(*problem) * fastres::cuda::sums(*problem) * problem->channels;
}

int vector_length(const fastres::cuda::Problem* problem) { return fastres::cuda::vector_length(*problem); }
int64_t parts(const fastres::cuda::Problem* problem) { return fastres::cuda::parts(*problem); }
uint64_t problem_size() { return sizeof(fastres::cuda::Problem); }
}
