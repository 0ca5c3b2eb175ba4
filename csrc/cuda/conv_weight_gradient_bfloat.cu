// The weight gradient's kernels of one storage type, a translation unit of their own so that all build side by side.
#include "launch_kernel.cuh"

#include "../../kernels/conv_stats/cuda_weight_gradient_launch.cuh"

namespace fastres::cuda {
template void launch_weight_gradient_type<BFloat, false>(const ConvBackward&, void*);
}  // namespace fastres::cuda
