// What training needs of the convolution engine: conv_forward_native, conv_input_gradient_native and conv_weight_gradient_native. The
// schemas are in fastres/ops/schemas.py; kernels/conv_stats/native.py puts them together.
#include <atomic>
#include <tuple>
#include <vector>

#include "conv.h"
#include "conv_problem.h"

namespace fastres {
namespace {

void set_prologue(Conv& conv, const std::optional<AffineTensors>& affine, bool relu) {
  if (!affine) return;
  const Affine a = pointers(*affine);
  conv.scale = a.scale;
  conv.center = a.center;
  conv.shift = a.shift;
  conv.prologue_relu = relu;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor center, OptionalTensor shift,
                                           bool relu, Ints stride, Ints padding, Ints dilation, int64_t groups, bool stats) {
  const Checker c{"fastres::conv_forward_native"};
  const MemoryFormat format = format_of(x);
  Conv conv = conv_of(c, x, weight, stride, padding, dilation, groups);
  const auto affine = check_prologue(c, scale, center, shift, x);
  x = dense(x, MemoryFormat::ChannelsLast);
  set_prologue(conv, affine, relu);
  const int64_t K = conv.shape.out_channels;
  Tensor y = empty_as(x, out_sizes(conv.shape), x.scalar_type(), MemoryFormat::ChannelsLast);
  Tensor mean = empty_vector(x, stats ? K : 0), var = empty_vector(x, stats ? K : 0);
  conv.x = x.const_data_ptr();
  conv.y = y.mutable_data_ptr();
  std::vector<float> rows;
  int64_t tasks = 0;
  if (y.numel() != 0) {
    float dummy = 0;
    conv.stats = stats ? &dummy : nullptr;  // its presence is part of the problem
    const ConvKernel& kernel = find_conv(conv);
    tasks = kernel.tasks(conv);
    if (stats) {
      rows.assign(tasks * 4 * K, 0.0f);
      conv.stats = rows.data();
    }
    const FloatWeights wide = float_weights(weight);
    conv.weights = packed_weights(kernel, conv, wide.view);
    run_conv(kernel, conv);
  }
  if (stats) {
    float* moments[2] = {mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>()};
    over_channels(K, tasks, [&](int64_t begin, int64_t end) {
      kernels().task_stats_merge(rows.data(), tasks, K, begin, end, moments[0], moments[1]);
    });
  }
  return {dense(y, format), mean, var};
}

// The gradient of y with the share of the statistics, as something that is read: g + offset + slope*(y - mean).
struct Gradient {
  Tensor g, y;
  OptionalTensor mean;
  StatisticsShare share;

  Gradient(const Checker& c, Tensor grad_y, Tensor raw, const OptionalTensor& mean_, const OptionalTensor& grad_mean,
           const OptionalTensor& grad_var) {
    c.activation("grad_y", grad_y, kCpuTypes);
    c.like("y", raw, grad_y);
    g = dense(grad_y, MemoryFormat::ChannelsLast);
    y = g;
    if (!grad_mean && !grad_var) return;
    c.require(mean_.has_value(), "grad_mean and grad_var need the mean, got none");
    c.vector("mean", *mean_, grad_y);
    mean = mean_;
    y = dense(raw, MemoryFormat::ChannelsLast);
    if (grad_mean) c.vector("grad_mean", *grad_mean, grad_y);
    if (grad_var) c.vector("grad_var", *grad_var, grad_y);
    share = StatisticsShare(grad_mean, grad_var, g.size(1), static_cast<double>(g.size(0)) * g.size(2) * g.size(3));
  }

  void read_by(Conv& conv) const {
    conv.x = g.const_data_ptr();
    if (!mean) return;
    conv.raw = y.const_data_ptr();
    conv.mean = mean->const_data_ptr<float>();
    conv.offset = share.offset.data();
    conv.slope = share.slope.data();
  }
};

std::tuple<Tensor, Tensor, Tensor> input_gradient(Tensor grad_y, Tensor y, OptionalTensor mean, OptionalTensor grad_mean,
                                                  OptionalTensor grad_var, Tensor x, Tensor weight, OptionalTensor scale,
                                                  OptionalTensor center, OptionalTensor shift, bool relu, Ints stride, Ints padding,
                                                  Ints dilation, int64_t groups) {
  const Checker c{"fastres::conv_input_gradient_native"};
  const Conv given = conv_of(c, x, weight, stride, padding, dilation, groups);
  const ConvShape& f = given.shape;
  c.shaped("grad_y", grad_y, out_sizes(f));
  c.require(f.stride_h == 1 && f.stride_w == 1 && groups == 1, "only stride 1 and one group are served, got stride [", f.stride_h, ", ",
            f.stride_w, "] and ", groups, " groups");
  const auto affine = check_prologue(c, scale, center, shift, x);
  const Gradient gradient(c, grad_y, y, mean, grad_mean, grad_var);
  const MemoryFormat format = format_of(x);
  x = dense(x, MemoryFormat::ChannelsLast);

  Conv conv = given;
  conv.shape = {f.images,
                f.out_height,
                f.out_width,
                f.out_channels,
                f.height,
                f.width,
                f.in_channels,
                f.kernel_h,
                f.kernel_w,
                1,
                1,
                f.dilation_h * (f.kernel_h - 1) - f.pad_h,
                f.dilation_w * (f.kernel_w - 1) - f.pad_w,
                f.dilation_h,
                f.dilation_w,
                1};
  c.require(conv.shape.pad_h >= 0 && conv.shape.pad_w >= 0, "padding must not exceed dilation*(kernel - 1), got [", f.pad_h, ", ", f.pad_w,
            "]");
  gradient.read_by(conv);
  Tensor dx = empty_as(x, {f.images, f.in_channels, f.height, f.width}, x.scalar_type(), MemoryFormat::ChannelsLast);
  Tensor grad_scale = zero_vector(x, affine ? f.in_channels : 0), grad_shift = zero_vector(x, affine ? f.in_channels : 0);
  if (dx.numel() == 0) return {dense(dx, format), grad_scale, grad_shift};
  conv.y = dx.mutable_data_ptr();
  float dummy = 0;
  if (affine) {
    const Affine a = pointers(*affine);
    conv.pre = x.const_data_ptr();
    conv.out_scale = a.scale;
    conv.out_center = a.center;
    conv.out_shift = a.shift;
    conv.out_relu = relu;
    conv.grad_sums = &dummy;
  }
  const ConvKernel& kernel = find_conv(conv);
  const int64_t tasks = kernel.tasks(conv), C = f.in_channels;
  std::vector<float> rows(affine ? tasks * 2 * C : 0, 0.0f);
  if (affine) conv.grad_sums = rows.data();
  const FloatWeights wide = float_weights(weight);
  const WeightView& w = wide.view;
  conv.weights = packed_weights(kernel, conv, {w.data, w.in, w.out, w.tap_stride, true});
  run_conv(kernel, conv);
  if (affine) {
    float* out[2] = {grad_scale.mutable_data_ptr<float>(), grad_shift.mutable_data_ptr<float>()};
    over_channels(C, tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < 2; ++i) kernels().sum_parts(rows.data(), tasks, 2, i, C, begin, end, out[i]);
    });
  }
  return {dense(dx, format), grad_scale, grad_shift};
}

Tensor weight_gradient(Tensor grad_y, Tensor y, OptionalTensor mean, OptionalTensor grad_mean, OptionalTensor grad_var, Tensor x,
                       Tensor weight, OptionalTensor scale, OptionalTensor center, OptionalTensor shift, bool relu, Ints stride,
                       Ints padding, Ints dilation, int64_t groups) {
  const Checker c{"fastres::conv_weight_gradient_native"};
  const WeightGradientKernel* kernel = kernels().conv.weight_gradient;
  c.require(kernel != nullptr, "the instruction set ", isa().name, " has no kernel for weight gradients");
  WeightGradient problem{conv_of(c, x, weight, stride, padding, dilation, groups), {}};
  c.shaped("grad_y", grad_y, out_sizes(problem.input.shape));
  const auto affine = check_prologue(c, scale, center, shift, x);
  const Gradient gradient(c, grad_y, y, mean, grad_mean, grad_var);
  x = dense(x, MemoryFormat::ChannelsLast);
  problem.input.x = x.const_data_ptr();
  set_prologue(problem.input, affine, relu);
  problem.gradient.shape.in_channels = problem.input.shape.out_channels;
  gradient.read_by(problem.gradient);
  const char* reason = kernel->refusal(problem);
  if (reason != nullptr) c.require(false, "not served: ", reason);

  const std::array<int64_t, 4> sizes{weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  const MemoryFormat format = format_of(weight);
  Tensor dw = empty_as(x, sizes, ScalarType::Float, format);
  if (dw.numel() == 0 || grad_y.numel() == 0) return dense(torch::stable::to(torch::stable::zero_(dw), x.scalar_type()), format);
  float* partial = static_cast<float*>(weight_scratch(kernel->elements(problem) * kernel->groups(problem) * sizeof(float)));
  const int64_t tasks = kernel->tasks(problem), bytes = kernel->scratch_bytes(problem);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, min64(problem.input.threads, tasks), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      kernel->run(problem, task, thread_scratch(bytes), partial);
    }
  });
  const WeightView out = weight_view(dw, dw.mutable_data_ptr<float>());
  torch::stable::parallel_for(0, (sizes[0] + 31) / 32, 1,
                              [&](int64_t begin, int64_t end) { kernel->finish(problem, partial, out, begin, end); });
  return dense(torch::stable::to(dw, x.scalar_type()), format);
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("conv_forward_native", TORCH_BOX(&fastres::forward));
  m.impl("conv_input_gradient_native", TORCH_BOX(&fastres::input_gradient));
  m.impl("conv_weight_gradient_native", TORCH_BOX(&fastres::weight_gradient));
}
