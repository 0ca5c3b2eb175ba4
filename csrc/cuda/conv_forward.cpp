// conv_forward_cuda and conv_refusal_cuda.
#include "conv.h"

namespace fastres {

std::string conv_refusal(Tensor x, Tensor weight, Ints stride, Ints padding, Ints dilation) {
  const Checker c{"fastres::conv_refusal_cuda", "x"};
  const ConvSizes sizes = check_conv(c, kCudaFloats, x, weight, stride, padding, dilation, 1);
  const char* reason = cuda::input_gradient_refusal(geometry_of(c, sizes));  // the most that any of the kernels refuses
  return reason == nullptr ? "" : reason;
}

std::tuple<Tensor, Tensor, Tensor> conv_forward(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor center, OptionalTensor shift,
                                                bool prologue_relu, OptionalTensor bias, OptionalTensor residual, bool relu, Ints stride,
                                                Ints padding, Ints dilation, bool stats, bool tf32) {
  const Checker c{"fastres::conv_forward_cuda", "x"};
  const ConvSizes sizes = check_conv(c, kCudaFloats, x, weight, stride, padding, dilation, 1);
  const auto affine = check_prologue(c, scale, center, shift, x);
  const MemoryFormat format = format_of(x);

  cuda::ConvForward p{};
  p.shape = served(c, sizes, x, weight);
  const Place place(x);
  describe(p, x, weight, affine, prologue_relu, tf32);
  const int64_t K = sizes.filters;
  if (bias) {
    c.same_device("bias", *bias, x.device());
    const ScalarType type = bias->scalar_type();
    const bool known = std::find(kCudaFloats.begin(), kCudaFloats.end(), type) != kCudaFloats.end();
    if (!known) c.require(false, "bias must be float32, float16 or bfloat16, got ", dtype_text(type));
    if (bias->dim() != 1 || bias->size(0) != K) c.require(false, "bias must be [", K, "], got ", shape_text(*bias));
    bias = torch::stable::contiguous(*bias);
    p.bias_type = cuda_type(*bias);
    p.bias = bias->const_data_ptr();
  }
  if (residual) {
    residual = dense_map(c, "residual", *residual, sizes.y(), x);
    p.residual = residual->const_data_ptr();
  }
  p.relu = relu;

  Tensor y = empty_as(x, sizes.y(), x.scalar_type(), MemoryFormat::ChannelsLast);
  Tensor mean = empty_vector(x, stats ? K : 0), var = empty_vector(x, stats ? K : 0);
  p.y = y.mutable_data_ptr();
  OptionalTensor partial;
  if (stats) {
    p.mean = mean.mutable_data_ptr<float>();
    p.var = var.mutable_data_ptr<float>();
    partial = empty_vector(x, cuda::forward_workspace(p));
    p.partial = partial->mutable_data_ptr<float>();
  }
  check_launch(c, cuda::conv_forward(p, place.device, place.stream()), place, x, weight);
  return {dense(y, format), mean, var};
}

}  // namespace fastres
