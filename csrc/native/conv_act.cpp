// conv_act_native, and conv_kernel_native: the same by one named kernel, for tests and tuning. The schemas are in fastres/ops/schemas.py.
#include <string>
#include <vector>

#include "conv.h"
#include "conv_problem.h"

namespace fastres {
namespace {

// An empty kernel name asks for the preferred one.
Tensor run(const Checker& c, const std::string& name, Tensor x, const Tensor& weight, const OptionalTensor& bias, OptionalTensor residual,
           bool relu, const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  const MemoryFormat format = format_of(x);
  Conv conv = conv_of(c, x, weight, stride, padding, dilation, groups);
  x = dense(x, MemoryFormat::ChannelsLast);
  conv.x = x.const_data_ptr();
  Tensor y = empty_as(x, out_sizes(conv.shape), x.scalar_type(), MemoryFormat::ChannelsLast);
  std::vector<float> wide_bias;
  if (bias) {
    wide_bias = wide_vector(c, "bias", *bias, conv.shape.out_channels);
    conv.bias = wide_bias.data();
  }
  if (residual) {
    c.like("residual", *residual, y);
    residual = dense(*residual, MemoryFormat::ChannelsLast);
    conv.residual = residual->const_data_ptr();
  }
  conv.relu = relu;
  conv.y = y.mutable_data_ptr();
  if (y.numel() != 0) {
    const ConvKernel& kernel = find_conv(conv, name);
    const FloatWeights wide = float_weights(weight);
    conv.weights = packed_weights(kernel, conv, wide.view);
    run_conv(kernel, conv);
  }
  return dense(y, format);
}

Tensor forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, bool relu, Ints stride, Ints padding, Ints dilation,
               int64_t groups) {
  return run({"fastres::conv_act_native"}, "", x, weight, bias, residual, relu, stride, padding, dilation, groups);
}

Tensor by_kernel(std::string kernel, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, bool relu, Ints stride,
                 Ints padding, Ints dilation, int64_t groups) {
  return run({"fastres::conv_kernel_native"}, kernel, x, weight, bias, residual, relu, stride, padding, dilation, groups);
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("conv_act_native", TORCH_BOX(&fastres::forward));
  m.impl("conv_kernel_native", TORCH_BOX(&fastres::by_kernel));
}
