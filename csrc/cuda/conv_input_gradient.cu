#include "launch_kernel.cuh"

#include "../../kernels/conv_stats/cuda_input_gradient_launch.cuh"
#include "launch.h"

namespace fastres::cuda {

extern template void launch_input_gradient_type<Half, false>(const ConvBackward&, TileShape, void*);
extern template void launch_input_gradient_type<BFloat, false>(const ConvBackward&, TileShape, void*);
extern template void launch_input_gradient_type<float, false>(const ConvBackward&, TileShape, void*);
extern template void launch_input_gradient_type<float, true>(const ConvBackward&, TileShape, void*);

const char* conv_input_gradient(const ConvBackward& p, int device, void* stream) {
  if (const char* const reason = input_gradient_refusal(p.shape)) return reason;
  return with_errors(device, [&] {
    switch (p.type) {
      case Type::float16: return launch_input_gradient_type<Half, false>(p, input_gradient_tile(p), stream);
      case Type::bfloat16: return launch_input_gradient_type<BFloat, false>(p, input_gradient_tile(p), stream);
      case Type::float32: break;
    }
    p.precision == Precision::tf32 ? launch_input_gradient_type<float, false>(p, input_gradient_tile(p), stream)
                                   : launch_input_gradient_type<float, true>(p, input_gradient_tile(p), stream);
  });
}

}  // namespace fastres::cuda
