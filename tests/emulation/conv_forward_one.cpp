// One instance of the CUDA convolution forward, which builds fast: for sources that are wrong on purpose, and for the sanitizers.
#include "cuda_emulation.h"

#include "../../kernels/conv/cuda_forward_launch.cuh"

using namespace fastres::cuda;

extern "C" {

void conv_forward(const ConvForward* p) { launch_forward<Tile<Half, false, 64, 64, 32, 32, 3>, Activation, false, false>(*p, nullptr); }
int64_t conv_forward_size() { return sizeof(ConvForward); }
int64_t forward_workspace_of(const ConvForward* p) { return forward_workspace(*p); }
}
