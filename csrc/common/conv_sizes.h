// Checks that every convolution operator makes before it looks at a pointer: maps, weights, geometry, prologue.
#pragma once

#include <vector>

#include "tensors.h"

namespace fastres {

using Ints = std::vector<int64_t>;

inline int64_t pair_item(const Checker& c, const char* name, const Ints& v, size_t i, int64_t least) {
  c.require(v.size() == 1 || v.size() == 2, name, " must have 1 or 2 elements, got ", v.size());
  const int64_t x = v[v.size() == 1 ? 0 : i];
  c.require(x >= least, name, " must be at least ", least, ", got ", x);
  return x;
}

// x [N, C, H, W], weight [K, C/groups, R, S], y [N, K, P, Q].
struct ConvSizes {
  int64_t images, channels, height, width;
  int64_t filters, out_height, out_width, kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;

  std::array<int64_t, 4> x() const { return {images, channels, height, width}; }
  std::array<int64_t, 4> y() const { return {images, filters, out_height, out_width}; }
};

inline ConvSizes check_conv(const Checker& c, std::initializer_list<ScalarType> dtypes, const Tensor& x, const Tensor& weight,
                            const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  c.activation("x", x, dtypes);
  c.activation("weight", weight, dtypes);
  c.same_device("weight", weight, x.device());
  if (weight.scalar_type() != x.scalar_type()) {
    c.require(false, "weight must have x's dtype ", dtype_text(x.scalar_type()), ", got ", dtype_text(weight.scalar_type()));
  }
  ConvSizes s{};
  s.images = x.size(0);
  s.channels = x.size(1);
  s.height = x.size(2);
  s.width = x.size(3);
  s.filters = weight.size(0);
  s.kernel_h = weight.size(2);
  s.kernel_w = weight.size(3);
  s.stride_h = pair_item(c, "stride", stride, 0, 1);
  s.stride_w = pair_item(c, "stride", stride, 1, 1);
  s.pad_h = pair_item(c, "padding", padding, 0, 0);
  s.pad_w = pair_item(c, "padding", padding, 1, 0);
  s.dilation_h = pair_item(c, "dilation", dilation, 0, 1);
  s.dilation_w = pair_item(c, "dilation", dilation, 1, 1);
  s.groups = groups;
  c.require(groups >= 1 && s.channels % groups == 0 && s.filters % groups == 0, "groups = ", groups, " must divide both ", s.channels,
            " input and ", s.filters, " output channels");
  c.require(weight.size(1) == s.channels / groups, "weight must be [K, ", s.channels / groups, ", R, S] for ", s.channels,
            " input channels in ", groups, " groups, got ", shape_text(weight));
  const int64_t h = s.height + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1;
  const int64_t w = s.width + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1;
  c.require(s.kernel_h > 0 && s.kernel_w > 0 && h >= 0 && w >= 0, "x ", shape_text(x), " is too small for the kernel ", shape_text(weight),
            " with padding [", s.pad_h, ", ", s.pad_w, "] and dilation [", s.dilation_h, ", ", s.dilation_w, "]");
  s.out_height = h / s.stride_h + 1;
  s.out_width = w / s.stride_w + 1;
  return s;
}

// scale, center and shift of x's channels, or none of them.
inline std::optional<AffineTensors> check_prologue(const Checker& c, const OptionalTensor& scale, const OptionalTensor& center,
                                                   const OptionalTensor& shift, const Tensor& x) {
  const int given = scale.has_value() + center.has_value() + shift.has_value();
  c.require(given == 0 || given == 3, "scale, center and shift must be given together, got ", given, " of 3");
  if (given == 0) return std::nullopt;
  return check_affine(c, "", *scale, *center, *shift, x);
}

}  // namespace fastres
