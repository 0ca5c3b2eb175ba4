// batch_norm_act_cuda and batch_norm_act_backward_cuda; the schemas are in fastres/ops/schemas.py.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>

#include "../common/tensors.h"
#include "launch.h"

namespace fastres {
namespace {

using torch::stable::accelerator::DeviceGuard;
using torch::stable::accelerator::getCurrentStream;

constexpr std::initializer_list<ScalarType> kCudaTypes = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

// A map as the kernels read it: channels innermost, and at an address that 16-byte accesses can have.
Tensor rows_of(const Tensor& t) {
  Tensor rows = dense(t, MemoryFormat::ChannelsLast);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

// What forward and backward share: y and residual come from rows_of.
cuda::NormProblem problem_of(const Tensor& y, const OptionalTensor& residual, const Tensor& weight, const Tensor& bias, double eps,
                             bool relu) {
  cuda::NormProblem p{};
  p.type = y.scalar_type() == ScalarType::Float  ? cuda::Type::float32
           : y.scalar_type() == ScalarType::Half ? cuda::Type::float16
                                                 : cuda::Type::bfloat16;
  p.relu = relu;
  p.eps = static_cast<float>(eps);
  p.rows = y.size(0) * y.size(2) * y.size(3);
  p.channels = static_cast<int>(y.size(1));
  p.y = y.const_data_ptr();
  if (residual) p.residual = residual->const_data_ptr();
  p.weight = weight.const_data_ptr<float>();
  p.bias = bias.const_data_ptr<float>();
  return p;
}

void launch(const Checker& c, const Tensor& y, cuda::NormProblem& p, bool backward) {
  const int device = y.get_device_index();
  cuda::Chip chip{};
  const char* error = cuda::chip_of(device, &chip);
  if (error == nullptr) {
    const char* const reason = cuda::make_plan(chip, backward, &p);
    if (reason != nullptr) {
      c.require(false, "y ", shape_text(y), " ", dtype_text(y.scalar_type()), " doesn't fit on cuda:", device, ": ", reason);
    }
    const Tensor partial = empty_vector(y, 2 * p.plan.parts * static_cast<int64_t>(p.channels));
    // Words that float zeros leave as integer zeros. They aren't kept for the next call: it may run on another stream, or be replayed
    // in a CUDA graph, at the same time.
    Tensor arrived = zero_vector(y, p.plan.groups);
    p.partial = partial.mutable_data_ptr<float>();
    p.arrived = reinterpret_cast<unsigned*>(arrived.mutable_data_ptr<float>());
    error = cuda::batch_norm_act(p, backward, device, getCurrentStream(device).nativeHandle());
  }
  if (error != nullptr) {
    c.require(false, "launch failed for y ", shape_text(y), " ", dtype_text(y.scalar_type()), " on cuda:", device, ": ", error);
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor y, Tensor weight, Tensor bias, OptionalTensor residual, double eps, bool relu) {
  const Checker c{"fastres::batch_norm_act_cuda"};
  c.activation("y", y, kCudaTypes);
  c.vector("weight", weight, y);
  c.vector("bias", bias, y);
  if (residual) c.like("residual", *residual, y);

  const DeviceGuard guard(y.get_device_index());
  const MemoryFormat format = format_of(y);
  Tensor mean = empty_vector(y, y.size(1)), var = empty_vector(y, y.size(1));
  if (y.numel() == 0) {
    torch::stable::fill_(mean, std::nan(""));
    torch::stable::fill_(var, std::nan(""));
    return {empty_like_format(y, format), mean, var};
  }
  y = rows_of(y);
  if (residual) residual = rows_of(*residual);
  Tensor out = empty_like_format(y, MemoryFormat::ChannelsLast);
  cuda::NormProblem p = problem_of(y, residual, weight, bias, eps, relu);
  p.out = out.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr<float>();
  p.var = var.mutable_data_ptr<float>();
  launch(c, y, p, false);
  return {dense(out, format), mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor y, Tensor weight, Tensor bias, OptionalTensor residual, Tensor mean,
                                                    Tensor var, double eps, bool relu, bool need_residual) {
  const Checker c{"fastres::batch_norm_act_backward_cuda"};
  c.activation("y", y, kCudaTypes);
  c.like("grad", grad, y);
  c.vector("weight", weight, y);
  c.vector("bias", bias, y);
  c.vector("mean", mean, y);
  c.vector("var", var, y);
  if (residual) c.like("residual", *residual, y);

  const DeviceGuard guard(y.get_device_index());
  const MemoryFormat format = format_of(y), residual_format = residual ? format_of(*residual) : format;
  // Without ReLU the residual's gradient is `grad` itself, which the caller has, and its values don't matter.
  const bool want_residual = residual && need_residual && relu;
  if (y.numel() == 0) {
    return {empty_like_format(y, format), zero_vector(y, y.size(1)), zero_vector(y, y.size(1)),
            want_residual ? empty_like_format(y, residual_format) : empty_vector(y, 0)};
  }
  y = rows_of(y);
  grad = rows_of(grad);
  residual = residual && relu ? OptionalTensor(rows_of(*residual)) : std::nullopt;
  Tensor grad_y = empty_like_format(y, MemoryFormat::ChannelsLast);
  Tensor grad_residual = want_residual ? empty_like_format(y, MemoryFormat::ChannelsLast) : empty_vector(y, 0);
  Tensor grad_weight = empty_vector(y, y.size(1)), grad_bias = empty_vector(y, y.size(1));
  cuda::NormProblem p = problem_of(y, residual, weight, bias, eps, relu);
  p.mean = const_cast<float*>(mean.const_data_ptr<float>());  // only read in this pass
  p.var = const_cast<float*>(var.const_data_ptr<float>());
  p.grad = grad.const_data_ptr();
  p.grad_y = grad_y.mutable_data_ptr();
  if (want_residual) p.grad_residual = grad_residual.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr<float>();
  p.grad_bias = grad_bias.mutable_data_ptr<float>();
  launch(c, y, p, true);
  return {dense(grad_y, format), grad_weight, grad_bias, want_residual ? dense(grad_residual, residual_format) : grad_residual};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("batch_norm_act_cuda", TORCH_BOX(&fastres::forward));
  m.impl("batch_norm_act_backward_cuda", TORCH_BOX(&fastres::backward));
}
