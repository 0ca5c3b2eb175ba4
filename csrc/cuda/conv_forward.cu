#include "launch_kernel.cuh"

#include "../../kernels/conv/cuda_forward_launch.cuh"
#include "launch.h"

namespace fastres::cuda {

extern template void launch_forward_type<Half, false>(const ConvForward&, TileShape, void*);
extern template void launch_forward_type<BFloat, false>(const ConvForward&, TileShape, void*);
extern template void launch_forward_type<float, false>(const ConvForward&, TileShape, void*);
extern template void launch_forward_type<float, true>(const ConvForward&, TileShape, void*);

const char* conv_forward(const ConvForward& p, int device, void* stream) {
  return with_errors(device, [&] {
    switch (p.type) {
      case Type::float16: return launch_forward_type<Half, false>(p, forward_tile(p), stream);
      case Type::bfloat16: return launch_forward_type<BFloat, false>(p, forward_tile(p), stream);
      case Type::float32: break;
    }
    p.precision == Precision::tf32 ? launch_forward_type<float, false>(p, forward_tile(p), stream)
                                   : launch_forward_type<float, true>(p, forward_tile(p), stream);
  });
}

}  // namespace fastres::cuda
