// scale_shift_act_native and scale_shift_act_backward_native; the schemas are in fastres/ops/schemas.py.
#include <tuple>

#include "problem.h"

namespace fastres {
namespace {

Residual kind_of(const OptionalTensor& residual, const std::optional<AffineTensors>& affine) {
  return affine ? Residual::affine : residual ? Residual::plain : Residual::none;
}

Tensor forward(Tensor y, Tensor scale, Tensor center, Tensor shift, OptionalTensor residual, OptionalTensor res_scale,
               OptionalTensor res_center, OptionalTensor res_shift, bool relu) {
  const Checker c{"fastres::scale_shift_act_native"};
  const KernelTable& table = kernels();
  c.activation("y", y, kCpuTypes);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const auto res = check_residual(c, y, residual, res_scale, res_center, res_shift);

  const MemoryFormat format = format_of(y);
  y = dense(y, format);
  if (residual) residual = dense(*residual, format);
  Tensor out = empty_like_format(y, format);
  if (y.numel() == 0) return out;
  const Shape s = shape_of(y, format);
  const ScaleShiftAct problem{s,
                              is_bfloat16(y),
                              relu,
                              kind_of(residual, res),
                              pointers(main),
                              res ? pointers(*res) : Affine{},
                              y.const_data_ptr(),
                              residual ? residual->const_data_ptr() : nullptr,
                              out.mutable_data_ptr()};
  run_items(table.scale_shift_act, problem, items_of(s), elements_of_item(s));
  return out;
}

// The backward pass; with `reuse_grad` grad_y is written over `grad`, which saves a tensor's allocation and its first touch.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(const Checker& c, bool reuse_grad, Tensor grad, Tensor y,
                                                                        Tensor scale, Tensor center, Tensor shift, OptionalTensor residual,
                                                                        OptionalTensor res_scale, OptionalTensor res_center,
                                                                        OptionalTensor res_shift, bool relu, bool need_residual) {
  const KernelTable& table = kernels();
  c.activation("y", y, kCpuTypes);
  c.like("grad", grad, y);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const auto res = check_residual(c, y, residual, res_scale, res_center, res_shift);

  const MemoryFormat format = format_of(y), residual_format = residual ? format_of(*residual) : format;
  y = dense(y, format);
  grad = dense(grad, format);
  if (residual) residual = dense(*residual, format);
  const int64_t C = y.size(1);
  // Without ReLU and without its own scale, the residual's gradient is `grad` itself, which the caller has.
  const bool want_residual = res || (residual && need_residual && relu);
  Tensor grad_y = reuse_grad ? grad : empty_like_format(y, format), grad_scale = empty_vector(y, C), grad_shift = empty_vector(y, C);
  Tensor grad_residual = want_residual ? empty_like_format(y, format) : empty_vector(y, 0);
  Tensor grad_res_scale = empty_vector(y, res ? C : 0), grad_res_shift = empty_vector(y, res ? C : 0);

  const Shape s = shape_of(y, format);
  const int64_t sums = res ? 3 : 2;
  const auto partial = scratch(y.numel() == 0 ? 0 : parts_of(s) * sums * C);
  if (y.numel() != 0) {
    const ScaleShiftActBackward problem{s,
                                        is_bfloat16(y),
                                        relu,
                                        kind_of(residual, res),
                                        pointers(main),
                                        res ? pointers(*res) : Affine{},
                                        grad.const_data_ptr(),
                                        y.const_data_ptr(),
                                        residual ? residual->const_data_ptr() : nullptr,
                                        grad_y.mutable_data_ptr(),
                                        want_residual ? grad_residual.mutable_data_ptr() : nullptr,
                                        partial.get()};
    run_items(table.scale_shift_act_backward, problem, items_of(s), elements_of_item(s));
  }
  add_parts(partial.get(), s, sums, 0, grad_scale);
  add_parts(partial.get(), s, sums, 1, grad_shift);
  if (res) {
    add_parts(partial.get(), s, sums, 2, grad_res_scale);
    add_parts(partial.get(), s, sums, 1, grad_res_shift);  // both shifts are added to the same pre-activation
  }
  if (want_residual) grad_residual = dense(grad_residual, residual_format);  // a gradient has its own tensor's layout
  return {grad_y, grad_scale, grad_shift, grad_residual, grad_res_scale, grad_res_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor y, Tensor scale, Tensor center, Tensor shift,
                                                                    OptionalTensor residual, OptionalTensor res_scale,
                                                                    OptionalTensor res_center, OptionalTensor res_shift, bool relu,
                                                                    bool need_residual) {
  const Checker c{"fastres::scale_shift_act_backward_native"};
  return run_backward(c, false, grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu, need_residual);
}

std::tuple<Tensor, Tensor> backward_in_place(Tensor grad, Tensor y, Tensor scale, Tensor center, Tensor shift, bool relu) {
  const Checker c{"fastres::scale_shift_act_backward_native_"};
  c.like("grad", grad, y);
  const MemoryFormat format = format_of(y);
  STD_TORCH_CHECK(grad.numel() == 0 || dense(grad, format).const_data_ptr() == grad.const_data_ptr(),
                  "fastres::scale_shift_act_backward_native_: grad must be dense in y's memory format");
  const auto none = OptionalTensor{};
  const auto grads = run_backward(c, true, grad, y, scale, center, shift, none, none, none, none, relu, false);
  return {std::get<1>(grads), std::get<2>(grads)};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("scale_shift_act_native", TORCH_BOX(&fastres::forward));
  m.impl("scale_shift_act_backward_native", TORCH_BOX(&fastres::backward));
  m.impl("scale_shift_act_backward_native_", TORCH_BOX(&fastres::backward_in_place));
}
