// All kernels of the CUDA convolution forward, to be compiled to PTX.
#include "../../csrc/cuda/launch_kernel.cuh"

#include "../../kernels/conv/cuda_forward_launch.cuh"

namespace fastres::cuda {
template void launch_forward_type<Half, false>(const ConvForward&, TileShape, void*);
template void launch_forward_type<BFloat, false>(const ConvForward&, TileShape, void*);
template void launch_forward_type<float, false>(const ConvForward&, TileShape, void*);
template void launch_forward_type<float, true>(const ConvForward&, TileShape, void*);
}  // namespace fastres::cuda
