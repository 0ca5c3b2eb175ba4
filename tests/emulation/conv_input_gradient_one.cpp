// Few instances of conv_stats' input gradient, which build fast: for sources that are wrong on purpose.
#include "cuda_emulation.h"

#include "../../kernels/conv_stats/cuda_input_gradient_launch.cuh"

using namespace fastres::cuda;

extern "C" {

void input_gradient(const ConvBackward* p) {
  launch_input_gradient_kind<Tile<Half, false, 64, 64, 32, 32, 3>, Combined<true>>(*p, nullptr);
}
int64_t conv_backward_size() { return sizeof(ConvBackward); }
int64_t input_gradient_workspace_of(const ConvBackward* p) { return input_gradient_workspace(*p); }
}
