// conv_act_native; the schema is in fastres/ops/schemas.py.
#include <vector>

#include "conv.h"
#include "conv_problem.h"

namespace fastres {
namespace {

Tensor forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual, bool relu, std::vector<int64_t> stride,
               std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const Checker c{"fastres::conv_act_native"};
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
    const ConvKernel& kernel = find_conv(conv);
    const FloatWeights wide = float_weights(weight);
    conv.weights = packed_weights(kernel, conv, wide.view);
    run_conv(kernel, conv);
  }
  return dense(y, format);
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) { m.impl("conv_act_native", TORCH_BOX(&fastres::forward)); }
