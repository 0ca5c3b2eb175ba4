// The entries of conv_stats' input gradient that tests/test_cuda_input_gradient.py runs as PTX.
#include "csrc/cuda/launch_kernel.cuh"
#include "kernels/conv_stats/cuda_input_gradient_launch.cuh"

namespace fastres::cuda {
template void launch_input_gradient_type<Half, false>(const ConvBackward&, TileShape, void*);
template void launch_input_gradient_type<BFloat, false>(const ConvBackward&, TileShape, void*);
template void launch_input_gradient_type<float, false>(const ConvBackward&, TileShape, void*);
template void launch_input_gradient_type<float, true>(const ConvBackward&, TileShape, void*);
}  // namespace fastres::cuda
