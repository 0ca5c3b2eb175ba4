// From checked tensors to a problem of the convolution engine.
#pragma once

#include <cstring>
#include <vector>

#include "conv.h"
#include "problem.h"

namespace fastres {

inline std::array<int64_t, 4> out_sizes(const ConvShape& s) { return {s.images, s.out_channels, s.out_height, s.out_width}; }

inline int64_t pair_item(const Checker& c, const char* name, const std::vector<int64_t>& v, size_t i, int64_t least) {
  c.require(v.size() == 1 || v.size() == 2, name, " must have 1 or 2 elements, got ", v.size());
  const int64_t x = v[v.size() == 1 ? 0 : i];
  c.require(x >= least, name, " must be at least ", least, ", got ", x);
  return x;
}

// The shape and dtype of conv(x, weight), everything checked; no pointers yet.
inline Conv conv_of(const Checker& c, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  c.activation("x", x, kCpuTypes);
  c.activation("weight", weight, kCpuTypes);
  c.same_device("weight", weight, x.device());
  if (weight.scalar_type() != x.scalar_type()) {
    c.require(false, "weight must have x's dtype ", dtype_text(x.scalar_type()), ", got ", dtype_text(weight.scalar_type()));
  }
  Conv conv{};
  ConvShape& s = conv.shape;
  s.images = x.size(0);
  s.in_channels = x.size(1);
  s.height = x.size(2);
  s.width = x.size(3);
  s.out_channels = weight.size(0);
  s.kernel_h = weight.size(2);
  s.kernel_w = weight.size(3);
  s.stride_h = pair_item(c, "stride", stride, 0, 1);
  s.stride_w = pair_item(c, "stride", stride, 1, 1);
  s.pad_h = pair_item(c, "padding", padding, 0, 0);
  s.pad_w = pair_item(c, "padding", padding, 1, 0);
  s.dilation_h = pair_item(c, "dilation", dilation, 0, 1);
  s.dilation_w = pair_item(c, "dilation", dilation, 1, 1);
  s.groups = groups;
  c.require(groups >= 1 && s.in_channels % groups == 0 && s.out_channels % groups == 0, "groups = ", groups, " must divide both ",
            s.in_channels, " input and ", s.out_channels, " output channels");
  c.require(weight.size(1) == s.in_channels / groups, "weight must be [K, ", s.in_channels / groups, ", R, S] for ", s.in_channels,
            " input channels in ", groups, " groups, got ", shape_text(weight));
  const int64_t h = s.height + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1;
  const int64_t w = s.width + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1;
  c.require(s.kernel_h > 0 && s.kernel_w > 0 && h >= 0 && w >= 0, "x ", shape_text(x), " is too small for the kernel ", shape_text(weight),
            " with padding [", s.pad_h, ", ", s.pad_w, "] and dilation [", s.dilation_h, ", ", s.dilation_w, "]");
  s.out_height = h / s.stride_h + 1;
  s.out_width = w / s.stride_w + 1;
  conv.bfloat16 = is_bfloat16(x);
  conv.packed_for_one = true;
  conv.threads = static_cast<int>(torch::stable::get_num_threads());
  return conv;
}

// A float or bf16 vector [n] as float.
inline std::vector<float> wide_vector(const Checker& c, const char* name, const Tensor& t, int64_t n) {
  c.require(t.dim() == 1 && t.size(0) == n, name, " must be [", n, "], got ", shape_text(t));
  const bool half = is_bfloat16(t);
  c.require(half || t.scalar_type() == ScalarType::Float, name, " must be float32 or bfloat16, got ", dtype_text(t.scalar_type()));
  const Tensor dense_t = torch::stable::contiguous(t);
  std::vector<float> out(n);
  if (!half) {
    std::memcpy(out.data(), dense_t.const_data_ptr(), n * sizeof(float));
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(dense_t.const_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(&out[i], &wide, sizeof wide);
    }
  }
  return out;
}

// Weights [K, C/groups, R, S] as float in the layout they have (contiguous or channels_last), and how to read them.
struct FloatWeights {
  Tensor tensor;
  WeightView view;
};

inline WeightView weight_view(const Tensor& t, float* data) {
  const int64_t taps = t.size(2) * t.size(3), C = t.size(1);
  if (format_of(t) == MemoryFormat::ChannelsLast) return {data, C * taps, 1, C, false};
  return {data, C * taps, taps, 1, false};
}

inline FloatWeights float_weights(const Tensor& weight) {
  const Tensor t = dense(torch::stable::to(weight, ScalarType::Float), format_of(weight));
  return {t, weight_view(t, static_cast<float*>(const_cast<void*>(t.const_data_ptr())))};
}

// The weights of `view` packed for the kernel, in this thread's own memory: good until its next call.
inline const void* packed_weights(const ConvKernel& kernel, const Conv& conv, const WeightView& view) {
  void* packed = weight_scratch(kernel.packed_bytes(conv.shape, conv.bfloat16));
  pack_conv(kernel, conv.shape, conv.bfloat16, view, packed);
  return packed;
}

}  // namespace fastres
