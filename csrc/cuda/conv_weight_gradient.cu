#include "launch_kernel.cuh"

#include "../../kernels/conv_stats/cuda_weight_gradient_launch.cuh"
#include "launch.h"

namespace fastres::cuda {

extern template void launch_weight_gradient_type<Half, false>(const ConvBackward&, void*);
extern template void launch_weight_gradient_type<BFloat, false>(const ConvBackward&, void*);
extern template void launch_weight_gradient_type<float, false>(const ConvBackward&, void*);
extern template void launch_weight_gradient_type<float, true>(const ConvBackward&, void*);

const char* conv_weight_gradient(const ConvBackward& p, int device, void* stream) {
  return with_errors(device, [&] {
    switch (p.type) {
      case Type::float16: return launch_weight_gradient_type<Half, false>(p, stream);
      case Type::bfloat16: return launch_weight_gradient_type<BFloat, false>(p, stream);
      case Type::float32: break;
    }
    p.precision == Precision::tf32 ? launch_weight_gradient_type<float, false>(p, stream)
                                   : launch_weight_gradient_type<float, true>(p, stream);
  });
}

}  // namespace fastres::cuda
