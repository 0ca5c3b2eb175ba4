// The CUDA convolutions as operators: conv.cpp registers them, conv_forward.cpp and conv_backward.cpp check, allocate and launch. The
// schemas are in fastres/ops/schemas.py; kernels/conv_stats/cuda_backend.py and kernels/conv_act/cuda_backend.py put them together.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>

#include "../../kernels/conv/cuda_shape.h"
#include "../common/conv_sizes.h"
#include "launch.h"
#include "place.h"

namespace fastres {

// Why the kernels don't serve that convolution of one group; empty where they do.
std::string conv_refusal(Tensor x, Tensor weight, Ints stride, Ints padding, Ints dilation);

// (y [N, K, P, Q] in x's format, mean [K], var [K]); the last two are empty without `stats`.
std::tuple<Tensor, Tensor, Tensor> conv_forward(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor center, OptionalTensor shift,
                                                bool prologue_relu, OptionalTensor bias, OptionalTensor residual, bool relu, Ints stride,
                                                Ints padding, Ints dilation, bool stats, bool tf32);

// (grad_x in x's format, grad_weight in weight's format, grad_scale [C], grad_shift [C]); empty where they aren't asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_backward(OptionalTensor grad_y, OptionalTensor grad_mean, OptionalTensor grad_var, Tensor x,
                                                         Tensor weight, OptionalTensor y, OptionalTensor mean, OptionalTensor scale,
                                                         OptionalTensor center, OptionalTensor shift, bool relu, Ints stride, Ints padding,
                                                         Ints dilation, bool need_input, bool need_weight, OptionalTensor addend,
                                                         OptionalTensor factor, bool tf32);

inline cuda::Geometry geometry_of(const Checker& c, const ConvSizes& s) {
  const auto narrow = [&](const char* name, int64_t value) {
    c.require(value <= 0x7fffffff, name, " = ", value, " is too large, the kernels count to 2147483647");
    return static_cast<int>(value);
  };
  return {s.images,
          narrow("C", s.channels),
          narrow("H", s.height),
          narrow("W", s.width),
          narrow("K", s.filters),
          narrow("P", s.out_height),
          narrow("Q", s.out_width),
          narrow("R", s.kernel_h),
          narrow("S", s.kernel_w),
          narrow("stride", s.stride_h),
          narrow("stride", s.stride_w),
          narrow("padding", s.pad_h),
          narrow("padding", s.pad_w),
          narrow("dilation", s.dilation_h),
          narrow("dilation", s.dilation_w)};
}

// The checked geometry of a convolution that the kernels serve.
inline cuda::Geometry served(const Checker& c, const ConvSizes& s, const Tensor& x, const Tensor& weight) {
  c.require(x.numel() != 0 && weight.numel() != 0, "not served: x ", shape_text(x), " or weight ", shape_text(weight), " is empty");
  const cuda::Geometry shape = geometry_of(c, s);
  if (const char* reason = cuda::refusal(shape)) c.require(false, "not served: ", reason);
  return shape;
}

// A float32 vector [n] on x's device. Gradients of vectors may be expanded scalars, which are copied.
inline Tensor dense_vector(const Checker& c, const char* name, const Tensor& t, int64_t n, const Tensor& x) {
  c.same_device(name, t, x.device());
  if (t.scalar_type() != ScalarType::Float) c.require(false, name, " must be float32, got ", dtype_text(t.scalar_type()));
  if (t.dim() != 1 || t.size(0) != n) c.require(false, name, " must be [", n, "], got ", shape_text(t));
  return torch::stable::contiguous(t);
}

// A map of the given shape with x's dtype, on x's device, dense in channels_last.
inline Tensor dense_map(const Checker& c, const char* name, const Tensor& t, const std::array<int64_t, 4>& sizes, const Tensor& x) {
  c.same_device(name, t, x.device());
  c.shaped(name, t, sizes);
  if (t.scalar_type() != x.scalar_type()) {
    c.require(false, name, " must have x's dtype ", dtype_text(x.scalar_type()), ", got ", dtype_text(t.scalar_type()));
  }
  return dense(t, MemoryFormat::ChannelsLast);
}

inline void check_launch(const Checker& c, const char* error, const Place& place, const Tensor& x, const Tensor& weight) {
  if (error == nullptr) return;
  c.require(false, "launch failed for x ", shape_text(x), ", weight ", shape_text(weight), ", ", dtype_text(x.scalar_type()),
            " on cuda:", place.device, ": ", error);
}

inline cuda::Precision precision_of(bool tf32) { return tf32 ? cuda::Precision::tf32 : cuda::Precision::float32; }

// What a problem of either direction says of x, the weights and the prologue; both tensors become dense in channels_last. x's device is
// current.
template <class Problem>
void describe(Problem& p, Tensor& x, Tensor& weight, const std::optional<AffineTensors>& affine, bool relu, bool tf32) {
  p.type = cuda_type(x);
  p.precision = precision_of(tf32);
  x = dense(x, MemoryFormat::ChannelsLast);
  weight = dense(weight, MemoryFormat::ChannelsLast);
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.prologue = cuda_affine(affine);
  p.prologue_relu = affine && relu;
}

}  // namespace fastres
