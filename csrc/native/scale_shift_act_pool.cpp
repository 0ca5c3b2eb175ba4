// scale_shift_act_pool_native, its backward and its gather; the schemas are in fastres/ops/schemas.py.
#include <tuple>

#include "problem.h"

namespace fastres {
namespace {

Window check_window(const Checker& c, const Tensor& y, int64_t kernel, int64_t stride, int64_t padding) {
  c.require(kernel >= 1 && kernel <= 15, "kernel must be from 1 to 15 (positions are stored in 8 bits), got ", kernel);
  c.require(stride >= 1, "stride must be at least 1, got ", stride);
  c.require(padding >= 0 && 2 * padding <= kernel, "padding must be from 0 to half the kernel (", kernel / 2, "), got ", padding);
  const int64_t h = y.size(2) + 2 * padding - kernel, w = y.size(3) + 2 * padding - kernel;
  c.require(y.size(2) > 0 && y.size(3) > 0 && h >= 0 && w >= 0, "y is too small for a window of ", kernel, " with padding ", padding, ": ",
            shape_text(y));
  return {kernel, stride, padding, h / stride + 1, w / stride + 1};
}

std::array<int64_t, 4> out_sizes(const Tensor& y, const Window& w) { return {y.size(0), y.size(1), w.out_height, w.out_width}; }

// Layout of the pool's own outputs: y's, decided from y's format, since a 1x1 map loses the difference but its consumers don't mind.
int64_t pool_items(const Shape& s, const Window& w) { return s.images * w.out_height * (s.planes ? s.channels : 1); }
int64_t pool_elements(const Shape& s, const Window& w) { return w.out_width * w.kernel * w.kernel * (s.planes ? 1 : s.channels); }

void check_index(const Checker& c, const Tensor& index, const Tensor& y, const Window& w) {
  c.require(index.defined(), "index is an undefined tensor");
  c.same_device("index", index, y.device());
  c.shaped("index", index, out_sizes(y, w));
  if (index.scalar_type() != ScalarType::Byte) {
    c.require(false, "index must be uint8, got ", dtype_text(index.scalar_type()));
  }
}

// Pool and gather work on planes exactly where the tensors are contiguous: their outputs have another plane size than y.
Shape pool_shape(const Tensor& y, MemoryFormat format) {
  return {y.size(0), y.size(1), y.size(2), y.size(3), format == MemoryFormat::Contiguous};
}

std::tuple<Tensor, Tensor> pool(Tensor y, Tensor scale, Tensor center, Tensor shift, bool relu, int64_t kernel, int64_t stride,
                                int64_t padding) {
  const Checker c{"fastres::scale_shift_act_pool_native"};
  const KernelTable& table = kernels();
  c.activation("y", y, kCpuTypes);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const Window window = check_window(c, y, kernel, stride, padding);

  const MemoryFormat format = format_of(y);
  y = dense(y, format);
  Tensor out = empty_as(y, out_sizes(y, window), y.scalar_type(), format);
  Tensor index = empty_as(y, out_sizes(y, window), ScalarType::Byte, format);
  if (out.numel() == 0) return {out, index};
  const Shape s = pool_shape(y, format);
  const ScaleShiftActPool problem{s,
                                  is_bfloat16(y),
                                  relu,
                                  pointers(main),
                                  window,
                                  y.const_data_ptr(),
                                  out.mutable_data_ptr(),
                                  static_cast<uint8_t*>(index.mutable_data_ptr())};
  run_items(table.scale_shift_act_pool, problem, pool_items(s, window), pool_elements(s, window));
  return {out, index};
}

Tensor gather(Tensor y, Tensor scale, Tensor center, Tensor shift, Tensor index, bool relu, int64_t kernel, int64_t stride,
              int64_t padding) {
  const Checker c{"fastres::scale_shift_act_pool_gather_native"};
  const KernelTable& table = kernels();
  c.activation("y", y, kCpuTypes);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const Window window = check_window(c, y, kernel, stride, padding);
  check_index(c, index, y, window);

  const MemoryFormat format = format_of(y);
  y = dense(y, format);
  index = dense(index, format);
  Tensor out = empty_as(y, out_sizes(y, window), y.scalar_type(), format);
  if (out.numel() == 0) return out;
  const Shape s = pool_shape(y, format);
  // The gather only reads the positions.
  uint8_t* positions = const_cast<uint8_t*>(static_cast<const uint8_t*>(index.const_data_ptr()));
  const ScaleShiftActPool problem{s, is_bfloat16(y), relu, pointers(main), window, y.const_data_ptr(), out.mutable_data_ptr(), positions};
  run_items(table.scale_shift_act_pool_gather, problem, pool_items(s, window), pool_elements(s, window));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor index, Tensor y, Tensor scale, Tensor center, Tensor shift, bool relu,
                                            int64_t kernel, int64_t stride, int64_t padding) {
  const Checker c{"fastres::scale_shift_act_pool_backward_native"};
  const KernelTable& table = kernels();
  c.activation("y", y, kCpuTypes);
  const AffineTensors main = check_affine(c, "", scale, center, shift, y);
  const Window window = check_window(c, y, kernel, stride, padding);
  check_index(c, index, y, window);
  c.activation("grad", grad, {y.scalar_type()});
  c.same_device("grad", grad, y.device());
  c.shaped("grad", grad, out_sizes(y, window));

  const MemoryFormat format = format_of(y);
  y = dense(y, format);
  grad = dense(grad, format);
  index = dense(index, format);
  const int64_t C = y.size(1);
  Tensor grad_y = empty_like_format(y, format), grad_scale = empty_vector(y, C), grad_shift = empty_vector(y, C);
  const Shape s = pool_shape(y, format);
  const auto partial = scratch(y.numel() == 0 ? 0 : parts_of(s) * 2 * C);
  if (y.numel() != 0) {
    const ScaleShiftActPoolBackward problem{s,
                                            is_bfloat16(y),
                                            relu,
                                            pointers(main),
                                            window,
                                            grad.const_data_ptr(),
                                            static_cast<const uint8_t*>(index.const_data_ptr()),
                                            y.const_data_ptr(),
                                            grad_y.mutable_data_ptr(),
                                            partial.get()};
    run_items(table.scale_shift_act_pool_backward, problem, items_of(s), elements_of_item(s));
  }
  add_parts(partial.get(), s, 2, 0, grad_scale);
  add_parts(partial.get(), s, 2, 1, grad_shift);
  return {grad_y, grad_scale, grad_shift};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("scale_shift_act_pool_native", TORCH_BOX(&fastres::pool));
  m.impl("scale_shift_act_pool_gather_native", TORCH_BOX(&fastres::gather));
  m.impl("scale_shift_act_pool_backward_native", TORCH_BOX(&fastres::backward));
}
