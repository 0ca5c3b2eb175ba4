// conv_backward_cuda: both gradients of a convolution, with the share of its statistics and the backward of its prologue.
#include "conv.h"

namespace fastres {

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(OptionalTensor grad_y, OptionalTensor grad_mean, OptionalTensor grad_var, Tensor x,
                                                         Tensor weight, OptionalTensor y, OptionalTensor mean, OptionalTensor scale,
                                                         OptionalTensor center, OptionalTensor shift, bool relu, Ints stride, Ints padding,
                                                         Ints dilation, bool need_input, bool need_weight, OptionalTensor addend,
                                                         OptionalTensor factor, bool tf32) {
  const Checker c{"fastres::conv_backward_cuda", "x"};
  const ConvSizes sizes = check_conv(c, kCudaFloats, x, weight, stride, padding, dilation, 1);
  const auto affine = check_prologue(c, scale, center, shift, x);
  const MemoryFormat format = format_of(x), weight_format = format_of(weight);
  const int64_t C = sizes.channels, K = sizes.filters;

  cuda::ConvBackward p{};
  p.shape = served(c, sizes, x, weight);
  const Place place(x);
  describe(p, x, weight, affine, relu, tf32);
  if (grad_y) {
    grad_y = dense_map(c, "grad_y", *grad_y, sizes.y(), x);
    p.grad_y = grad_y->const_data_ptr();
  }
  const auto vector = [&](const char* name, OptionalTensor& t) -> const float* {
    if (!t) return nullptr;
    t = dense_vector(c, name, *t, K, x);
    return t->const_data_ptr<float>();
  };
  p.grad_mean = vector("grad_mean", grad_mean);
  p.grad_var = vector("grad_var", grad_var);
  if (grad_y) p.factor = vector("factor", factor);
  if (grad_var) {  // only its share looks at y
    c.require(y && mean, "grad_var needs y and its mean, got ", y ? "y" : mean ? "the mean" : "neither");
    y = dense_map(c, "y", *y, sizes.y(), x);
    p.y = y->const_data_ptr();
    p.mean = vector("mean", mean);
  }

  Tensor grad_x = empty_vector(x, 0), grad_weight = empty_vector(x, 0), grad_scale = empty_vector(x, 0), grad_shift = empty_vector(x, 0);
  if (need_weight) {
    Tensor dw = empty_as(x, {K, C, sizes.kernel_h, sizes.kernel_w}, x.scalar_type(), MemoryFormat::ChannelsLast);
    cuda::ConvBackward q = p;
    q.grad_weight = dw.mutable_data_ptr();
    const Tensor workspace = empty_vector(x, cuda::weight_gradient_workspace(q));
    q.workspace = workspace.mutable_data_ptr<float>();
    check_launch(c, cuda::conv_weight_gradient(q, place.device, place.stream()), place, x, weight);
    grad_weight = dense(dw, weight_format);
  }
  if (need_input) {
    Tensor dx = empty_as(x, sizes.x(), x.scalar_type(), MemoryFormat::ChannelsLast);
    p.grad_x = dx.mutable_data_ptr();
    if (addend) {
      addend = dense_map(c, "addend", *addend, sizes.x(), x);
      p.addend = addend->const_data_ptr();
    }
    if (affine) {
      grad_scale = empty_vector(x, C);
      grad_shift = empty_vector(x, C);
      p.grad_scale = grad_scale.mutable_data_ptr<float>();
      p.grad_shift = grad_shift.mutable_data_ptr<float>();
    }
    const Tensor workspace = empty_vector(x, cuda::input_gradient_workspace(p));
    p.workspace = workspace.mutable_data_ptr<float>();
    check_launch(c, cuda::conv_input_gradient(p, place.device, place.stream()), place, x, weight);
    grad_x = dense(dx, format);
  }
  return {grad_x, grad_weight, grad_scale, grad_shift};
}

}  // namespace fastres
