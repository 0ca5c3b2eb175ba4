// The input gradient's kernels of one storage type, a translation unit of their own so that all build side by side.
#include "launch_kernel.cuh"

#include "../../kernels/conv_stats/cuda_input_gradient_launch.cuh"

namespace fastres::cuda {
template void launch_input_gradient_type<float, false>(const ConvBackward&, TileShape, void*);
template void launch_input_gradient_type<float, true>(const ConvBackward&, TileShape, void*);
}  // namespace fastres::cuda
