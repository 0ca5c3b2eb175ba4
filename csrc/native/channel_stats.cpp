// channel_stats_native and its backward; the schemas are in fastres/ops/schemas.py.
#include <tuple>
#include <vector>

#include "problem.h"

namespace fastres {
namespace {

std::tuple<Tensor, Tensor> stats(Tensor y) {
  const Checker c{"fastres::channel_stats_native"};
  const KernelTable& table = kernels();
  c.activation("y", y, kCpuTypes);
  const MemoryFormat format = format_of(y);
  y = dense(y, format);
  const int64_t C = y.size(1);
  Tensor mean = empty_vector(y, C), var = empty_vector(y, C);
  Shape s = shape_of(y, format);
  if (y.numel() == 0) s.images = 0;  // no parts at all, whichever size is zero
  const int64_t parts = parts_of(s);
  const auto partial = scratch(parts * 3 * C);
  const ChannelStats problem{s, is_bfloat16(y), y.const_data_ptr(), partial.get()};
  if (y.numel() != 0) run_items(table.channel_stats, problem, items_of(s), elements_of_item(s));
  float* mean_out = mean.mutable_data_ptr<float>();
  float* var_out = var.mutable_data_ptr<float>();
  over_channels(C, parts, [&](int64_t begin, int64_t end) { table.channel_stats_merge(problem, begin, end, mean_out, var_out); });
  return {mean, var};
}

Tensor backward(OptionalTensor grad_y, Tensor y, Tensor mean, OptionalTensor grad_mean, OptionalTensor grad_var) {
  const Checker c{"fastres::channel_stats_backward_native"};
  const KernelTable& table = kernels();
  c.activation("y", y, kCpuTypes);
  if (grad_y) c.like("grad_y", *grad_y, y);
  c.vector("mean", mean, y);
  if (grad_mean) c.vector("grad_mean", *grad_mean, y);
  if (grad_var) c.vector("grad_var", *grad_var, y);

  const MemoryFormat format = format_of(y);
  y = dense(y, format);
  if (grad_y) grad_y = dense(*grad_y, format);
  Tensor out = empty_like_format(y, format);
  if (y.numel() == 0) return out;
  const Shape s = shape_of(y, format);
  const StatisticsShare share(grad_mean, grad_var, s.channels, static_cast<double>(rows_of(s)));
  const ChannelStatsBackward problem{s,
                                     is_bfloat16(y),
                                     grad_y ? grad_y->const_data_ptr() : nullptr,
                                     y.const_data_ptr(),
                                     mean.const_data_ptr<float>(),
                                     share.offset.data(),
                                     share.slope.data(),
                                     out.mutable_data_ptr()};
  run_items(table.channel_stats_backward, problem, items_of(s), elements_of_item(s));
  return out;
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("channel_stats_native", TORCH_BOX(&fastres::stats));
  m.impl("channel_stats_backward_native", TORCH_BOX(&fastres::backward));
}
