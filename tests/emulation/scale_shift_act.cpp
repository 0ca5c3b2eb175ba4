// The CUDA kernels of scale_shift_act as a C library, for tests/test_cuda_pointwise.py.
#include "cuda_emulation.h"

#include "kernels/scale_shift_act/cuda_kernel.cuh"

using namespace fastres::cuda;

extern "C" {

void forward(const PointProblem* p) { launch<Pass::forward>(*p, nullptr); }
void backward(const PointProblem* p) { launch<Pass::backward>(*p, nullptr); }
void masked(const PointProblem* p) { launch<Pass::masked>(*p, nullptr); }

int64_t partial_size(const PointProblem* p) { return fastres::cuda::parts(*p) * sums(*p) * p->channels; }
int width(const PointProblem* p) { return vector_length(*p); }
int64_t parts(const PointProblem* p) { return fastres::cuda::parts(*p); }
uint64_t problem_size() { return sizeof(PointProblem); }
}
