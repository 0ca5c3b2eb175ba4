// The forward kernels of one storage type, a translation unit of their own so that all build side by side.
#include "launch_kernel.cuh"

#include "../../kernels/conv/cuda_forward_launch.cuh"

namespace fastres::cuda {
template void launch_forward_type<BFloat, false>(const ConvForward&, TileShape, void*);
}  // namespace fastres::cuda
