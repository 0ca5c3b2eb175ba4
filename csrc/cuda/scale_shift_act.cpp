// scale_shift_act_cuda, scale_shift_act_backward_cuda and scale_shift_act_masked_cuda; the schemas are in fastres/ops/schemas.py.
#include <tuple>

#include <torch/csrc/stable/accelerator.h>

#include "../common/tensors.h"
#include "launch.h"

namespace fastres {
namespace {

using torch::stable::accelerator::DeviceGuard;
using torch::stable::accelerator::getCurrentStream;

constexpr std::initializer_list<ScalarType> kCudaTypes = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

cuda::Affine pointers(const AffineTensors& t) {
  return {t.scale.const_data_ptr<float>(), t.center.const_data_ptr<float>(), t.shift.const_data_ptr<float>()};
}

// Shapes, flags and the inputs that forward and backward share; y and residual are dense in `format`.
cuda::PointProblem problem_of(const Tensor& y, const OptionalTensor& residual, const AffineTensors& main,
                              const std::optional<AffineTensors>& res, bool relu, MemoryFormat format) {
  cuda::PointProblem p{};
  p.type = y.scalar_type() == ScalarType::Float  ? cuda::Type::float32
           : y.scalar_type() == ScalarType::Half ? cuda::Type::float16
                                                 : cuda::Type::bfloat16;
  p.images = y.size(0);
  p.channels = y.size(1);
  p.plane = y.size(2) * y.size(3);
  // One position a plane: both layouts are the same memory, and rows of channels are the longer vectors.
  p.planes = format == MemoryFormat::Contiguous && p.plane != 1;
  p.relu = relu;
  p.residual_kind = res ? cuda::Residual::affine : residual ? cuda::Residual::plain : cuda::Residual::none;
  p.main = pointers(main);
  if (res) p.res = pointers(*res);
  p.y = y.const_data_ptr();
  if (residual) p.residual = residual->const_data_ptr();
  return p;
}

template <class Launch>
void launch(const Checker& c, const Tensor& y, const cuda::PointProblem& p, Launch function) {
  c.require(cuda::parts(p) * p.channels / cuda::kPointWarps < cuda::kMaxGrid, "y is too large for one launch: ", shape_text(y));
  const int device = y.get_device_index();
  const char* error = function(p, device, getCurrentStream(device).nativeHandle());
  if (error != nullptr) {
    c.require(false, "launch failed for y ", shape_text(y), " ", dtype_text(y.scalar_type()), " on cuda:", device, ": ", error);
  }
}

Tensor forward(Tensor y, Tensor scale, Tensor center, Tensor shift, OptionalTensor residual, OptionalTensor res_scale,
               OptionalTensor res_center, OptionalTensor res_shift, bool relu) {
  const Checker c{"fastres::scale_shift_act_cuda"};
  c.activation("y", y, kCudaTypes);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const auto res = check_residual(c, y, residual, res_scale, res_center, res_shift);

  const DeviceGuard guard(y.get_device_index());
  const MemoryFormat format = format_of(y);
  y = dense(y, format);
  if (residual) residual = dense(*residual, format);
  Tensor out = empty_like_format(y, format);
  if (y.numel() == 0) return out;
  cuda::PointProblem p = problem_of(y, residual, main, res, relu, format);
  p.out = out.mutable_data_ptr();
  launch(c, y, p, cuda::scale_shift_act);
  return out;
}

// The gradients that both backward passes have. grad_residual is empty where it isn't wanted or isn't a map of its own.
struct Gradients {
  Tensor y, scale, shift, residual, res_scale, res_shift;
};

template <class Launch>
Gradients gradients(const Checker& c, Tensor grad, Tensor y, const AffineTensors& main, OptionalTensor residual,
                    const std::optional<AffineTensors>& res, bool relu, bool want_residual, Launch function) {
  const DeviceGuard guard(y.get_device_index());
  const MemoryFormat format = format_of(y), residual_format = residual ? format_of(*residual) : format;
  y = dense(y, format);
  grad = dense(grad, format);
  if (residual) residual = dense(*residual, format);
  const int64_t C = y.size(1), of_residual = res ? C : 0;
  Tensor grad_y = empty_like_format(y, format);
  Tensor grad_residual = want_residual ? empty_like_format(y, format) : empty_vector(y, 0);
  if (y.numel() == 0) {
    return {grad_y, zero_vector(y, C), zero_vector(y, C), grad_residual, zero_vector(y, of_residual), zero_vector(y, of_residual)};
  }
  Tensor grad_scale = empty_vector(y, C), grad_shift = empty_vector(y, C), grad_res_scale = empty_vector(y, of_residual);
  cuda::PointProblem p = problem_of(y, residual, main, res, relu, format);
  p.grad = grad.const_data_ptr();
  p.grad_y = grad_y.mutable_data_ptr();
  if (want_residual) p.grad_residual = grad_residual.mutable_data_ptr();
  const Tensor partial = empty_vector(y, cuda::parts(p) * cuda::sums(p) * C);
  p.partial = partial.mutable_data_ptr<float>();
  p.sum_out[0] = grad_scale.mutable_data_ptr<float>();
  p.sum_out[1] = grad_shift.mutable_data_ptr<float>();
  p.sum_out[2] = res ? grad_res_scale.mutable_data_ptr<float>() : nullptr;
  launch(c, y, p, function);
  if (want_residual) grad_residual = dense(grad_residual, residual_format);  // a gradient has its own tensor's layout
  // Both shifts are added to the same pre-activation; an output may not be another output, so it is copied.
  Tensor grad_res_shift = res ? torch::stable::clone(grad_shift) : empty_vector(y, 0);
  return {grad_y, grad_scale, grad_shift, grad_residual, grad_res_scale, grad_res_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor y, Tensor scale, Tensor center, Tensor shift,
                                                                    OptionalTensor residual, OptionalTensor res_scale,
                                                                    OptionalTensor res_center, OptionalTensor res_shift, bool relu,
                                                                    bool need_residual) {
  const Checker c{"fastres::scale_shift_act_backward_cuda"};
  c.activation("y", y, kCudaTypes);
  c.like("grad", grad, y);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const auto res = check_residual(c, y, residual, res_scale, res_center, res_shift);
  // Without ReLU and without its own scale, the residual's gradient is `grad` itself, which the caller has.
  const bool want_residual = res || (residual && need_residual && relu);
  const Gradients g = gradients(c, grad, y, main, residual, res, relu, want_residual, cuda::scale_shift_act_backward);
  return {g.y, g.scale, g.shift, g.residual, g.res_scale, g.res_shift};
}

// dz in place of the gradients of y and of the residual, for those who scale it themselves.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked(Tensor grad, Tensor y, Tensor scale, Tensor center, Tensor shift,
                                                          OptionalTensor residual, OptionalTensor res_scale, OptionalTensor res_center,
                                                          OptionalTensor res_shift, bool relu) {
  const Checker c{"fastres::scale_shift_act_masked_cuda"};
  c.activation("y", y, kCudaTypes);
  c.like("grad", grad, y);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const auto res = check_residual(c, y, residual, res_scale, res_center, res_shift);
  const Gradients g = gradients(c, grad, y, main, residual, res, relu, false, cuda::scale_shift_act_masked);
  return {g.y, g.scale, g.shift, g.res_scale, g.res_shift};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("scale_shift_act_cuda", TORCH_BOX(&fastres::forward));
  m.impl("scale_shift_act_backward_cuda", TORCH_BOX(&fastres::backward));
  m.impl("scale_shift_act_masked_cuda", TORCH_BOX(&fastres::masked));
}
