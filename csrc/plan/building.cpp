// Building a plan: every step is checked when it is added, so that running needs no checks.
#include <algorithm>
#include <set>
#include <stdexcept>

#include "plan.h"

namespace fastres {
namespace {

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::string text;
  ((text += parts), ...);
  throw std::invalid_argument(text);
}

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace

Plan::Plan(const PlanOptions& options, const Map& input) : options_(options), arenas_(options.arena_limit) {
  require(options.images >= 1 && options.images_per_turn >= 1, "a plan is for at least one image, and takes at least one a turn");
  require(input.height >= 1 && input.width >= 1 && input.channels >= 1, "a plan's input must not be empty");
  Step step{};
  step.kind = StepKind::input;
  step.name = "input";
  add(std::move(step), input);
}

int Plan::add(Step step, const Map& out) {
  require(output_ < 0, "this plan is finished");
  maps_.push_back(out);
  const int value = static_cast<int>(maps_.size()) - 1;
  source_.push_back(value);
  step.output = value;
  steps_.push_back(std::move(step));
  return value;
}

void Plan::check_value(int value) const {
  require(value >= 0 && value < static_cast<int>(maps_.size()), "there is no value ", std::to_string(value));
}

const ConvKernel& Plan::kernel_for(const ConvShape& shape, bool linear, bool relu, bool residual, const std::string& name) const {
  static const float present = 0.0f;
  Conv conv{};
  conv.shape = shape;
  (linear ? conv.shape.width : conv.shape.images) = options_.images;
  if (linear) conv.shape.out_width = options_.images;
  conv.bfloat16 = options_.bfloat16;
  conv.relu = relu;
  conv.threads = 1;
  conv.bias = &present;
  conv.residual = residual ? &present : nullptr;
  return find_conv(conv, name);
}

void Plan::check_residual(const std::string& name, int residual, const Map& out) const {
  if (residual < 0) return;
  check_value(residual);
  const Map& r = map(residual);
  require(r.height == out.height && r.width == out.width && r.channels == out.channels, name, ": what is added has another shape");
}

int Plan::add_conv(const std::string& name, int input, ConvShape s, bool linear, bool relu, int residual,
                   std::shared_ptr<const PackedWeights> weights, std::vector<float> bias) {
  check_value(input);
  const Map& in = map(input);
  s.images = 1;
  require(in.height == s.height && in.width == s.width && in.channels == s.in_channels, name, ": the input has another shape");
  require(s.out_height == out_size(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h) &&
              s.out_width == out_size(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w) && s.out_height >= 1 && s.out_width >= 1,
          name, ": a wrong output size");
  require(!linear || (in.height == 1 && in.width == 1 && s.kernel_h == 1 && s.kernel_w == 1), name, ": not a matrix product");
  require(static_cast<int64_t>(bias.size()) == s.out_channels, name, ": the bias must have one value per output channel");
  require(weights != nullptr && weights->serves(weights->kernel(), s, options_.bfloat16), name, ": weights of another convolution");
  const Map out{s.out_height, s.out_width, s.out_channels};
  check_residual(name, residual, out);
  kernel_for(s, linear, relu, residual >= 0, weights->kernel().name);
  Step step{};
  step.kind = StepKind::convolution;
  step.name = name;
  step.input = input;
  step.residual = residual;
  step.relu = relu;
  step.linear = linear;
  step.conv = s;
  step.weights = std::move(weights);
  step.bias = std::move(bias);
  return add(std::move(step), out);
}

int Plan::add_pool(const std::string& name, int input, bool mean, MapPool p) {
  check_value(input);
  const Map& in = map(input);
  p.height = in.height;
  p.width = in.width;
  p.channels = in.channels;
  p.bfloat16 = options_.bfloat16;
  require(p.out_height >= 1 && p.out_width >= 1, name, ": an empty output");
  const auto covered = [](int64_t out, int64_t stride, int64_t pad, int64_t kernel, int64_t dilation, int64_t size) {
    return kernel >= 1 && stride >= 1 && dilation >= 1 && pad >= 0 && 2 * pad <= kernel * dilation && (out - 1) * stride - pad < size;
  };
  require(p.adaptive || (covered(p.out_height, p.stride_h, p.pad_h, p.kernel_h, p.dilation_h, p.height) &&
                         covered(p.out_width, p.stride_w, p.pad_w, p.kernel_w, p.dilation_w, p.width)),
          name, ": a window that doesn't fit the map");
  Step step{};
  step.kind = mean ? StepKind::mean_pool : StepKind::max_pool;
  step.name = name;
  step.input = input;
  step.pool = p;
  return add(std::move(step), {p.out_height, p.out_width, in.channels});
}

int Plan::add_scale_shift(const std::string& name, int input, int residual, bool relu, std::vector<float> scale, std::vector<float> center,
                          std::vector<float> shift) {
  check_value(input);
  const Map in = map(input);
  const auto channels = static_cast<size_t>(in.channels);
  if (scale.empty()) {
    scale.assign(channels, 1.0f);
    center.assign(channels, 0.0f);
    shift.assign(channels, 0.0f);
  }
  require(scale.size() == channels && center.size() == channels && shift.size() == channels, name, ": one coefficient per channel");
  check_residual(name, residual, in);
  Step step{};
  step.kind = StepKind::scale_shift;
  step.name = name;
  step.input = input;
  step.residual = residual;
  step.relu = relu;
  step.scale = std::move(scale);
  step.center = std::move(center);
  step.shift = std::move(shift);
  return add(std::move(step), in);
}

int Plan::add_place(const std::string& name, int input, MapPlace p) {
  check_value(input);
  const Map& in = map(input);
  p.height = in.height;
  p.width = in.width;
  p.channels = in.channels;
  p.bfloat16 = options_.bfloat16;
  require(p.out_height >= 1 && p.out_width >= 1 && p.out_channels >= 1 && p.stride_h >= 1 && p.stride_w >= 1, name, ": an empty output");
  Step step{};
  step.kind = StepKind::place;
  step.name = name;
  step.input = input;
  step.place = p;
  return add(std::move(step), {p.out_height, p.out_width, p.out_channels});
}

int Plan::add_flat(int input) {
  check_value(input);
  require(output_ < 0, "this plan is finished");
  maps_.push_back({1, 1, map(input).elements()});
  source_.push_back(source_[static_cast<size_t>(input)]);
  return static_cast<int>(maps_.size()) - 1;
}

void Plan::finish(int output) {
  check_value(output);
  require(output_ < 0, "this plan is finished");
  output_ = output;
  merge_pools();
}

int64_t Plan::weight_bytes() const {
  std::set<const PackedWeights*> counted;
  int64_t total = 0;
  for (const Step& step : steps_) {
    if (step.weights && counted.insert(step.weights.get()).second) total += step.weights->bytes();
  }
  return total;
}

}  // namespace fastres
