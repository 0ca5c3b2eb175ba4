// From checked tensors to a problem of the convolution engine.
#pragma once

#include <cstring>
#include <vector>

#include "../common/conv_sizes.h"
#include "conv.h"
#include "problem.h"

namespace fastres {

inline std::array<int64_t, 4> out_sizes(const ConvShape& s) { return {s.images, s.out_channels, s.out_height, s.out_width}; }

// The shape and dtype of conv(x, weight), everything checked; no pointers yet.
inline Conv conv_of(const Checker& c, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvSizes of = check_conv(c, kCpuTypes, x, weight, stride, padding, dilation, groups);
  Conv conv{};
  ConvShape& s = conv.shape;
  s.images = of.images;
  s.in_channels = of.channels;
  s.height = of.height;
  s.width = of.width;
  s.out_channels = of.filters;
  s.kernel_h = of.kernel_h;
  s.kernel_w = of.kernel_w;
  s.stride_h = of.stride_h;
  s.stride_w = of.stride_w;
  s.pad_h = of.pad_h;
  s.pad_w = of.pad_w;
  s.dilation_h = of.dilation_h;
  s.dilation_w = of.dilation_w;
  s.groups = of.groups;
  s.out_height = of.out_height;
  s.out_width = of.out_width;
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
