// The instance of conv_forward_one.cpp, to be compiled to PTX.
#include "../../csrc/cuda/launch_kernel.cuh"

#include "../../kernels/conv/cuda_forward_launch.cuh"

namespace fastres::cuda {
template void launch_forward<Tile<Half, false, 64, 64, 32, 32, 3>, Activation, false, false>(const ConvForward&, void*);
}  // namespace fastres::cuda
