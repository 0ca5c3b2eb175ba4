// Checks and allocation shared by the CPU and the CUDA operators: torch's stable ABI on one side, pointers and shapes on the other.
// Every check says what was given and what was expected; nothing here lets a wrong tensor reach a pointer.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace fastres {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws std::runtime_error (RuntimeError in Python) with the parts of the message joined. STD_TORCH_CHECK would put the C++ function,
// file and line first, which tells a user nothing.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << ']';
  return out.str();
}

inline std::string device_text(const Device& d) {
  std::ostringstream out;
  out << (d.is_cpu() ? "cpu" : d.is_cuda() ? "cuda" : "another device");
  if (d.has_index() && !d.is_cpu()) out << ':' << d.index();
  return out.str();
}

// torch's Python names for the dtypes that users have.
inline const char* dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(t);
  }
}

// The operator being checked, so that every message starts with its name.
struct Checker {
  const char* op;
  const char* main = "y";  // what the other tensors are compared with, in messages

  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    check(ok, op, ": ", parts...);
  }

  void same_device(const char* name, const Tensor& t, const Device& device) const {
    if (t.device() != device) {
      require(false, name, " is on ", device_text(t.device()), ", but ", main, " is on ", device_text(device),
              "; they must be on one device");
    }
  }

  // y: [N, C, H, W] in one of the given dtypes.
  void activation(const char* name, const Tensor& t, std::initializer_list<ScalarType> dtypes) const {
    require(t.defined(), name, " is an undefined tensor");
    if (t.dim() != 4) require(false, name, " must be [N, C, H, W], got ", t.dim(), " dimensions: ", shape_text(t));
    for (ScalarType dtype : dtypes) {
      if (t.scalar_type() == dtype) return;
    }
    std::ostringstream expected;
    for (auto it = dtypes.begin(); it != dtypes.end(); ++it) {
      expected << (it == dtypes.begin() ? "" : it + 1 == dtypes.end() ? " or " : ", ") << dtype_text(*it);
    }
    require(false, name, " must be ", expected.str(), ", got ", dtype_text(t.scalar_type()));
  }

  // Same device, dtype and shape as y.
  void like(const char* name, const Tensor& t, const Tensor& y) const {
    require(t.defined(), name, " is an undefined tensor");
    same_device(name, t, y.device());
    shaped(name, t, {y.size(0), y.size(1), y.size(2), y.size(3)});
    if (t.scalar_type() != y.scalar_type()) {
      require(false, name, " must have ", main, "'s dtype ", dtype_text(y.scalar_type()), ", got ", dtype_text(t.scalar_type()));
    }
  }

  void shaped(const char* name, const Tensor& t, const std::array<int64_t, 4>& sizes) const {
    bool same = t.dim() == 4;
    for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == sizes[d];
    if (!same) {
      require(false, name, " must have the shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "], got ", shape_text(t));
    }
  }

  // A contiguous float32 vector [C] on y's device.
  void vector(const char* name, const Tensor& t, const Tensor& y) const {
    require(t.defined(), name, " is an undefined tensor");
    same_device(name, t, y.device());
    if (t.scalar_type() != ScalarType::Float) {
      require(false, name, " must be float32, got ", dtype_text(t.scalar_type()));
    }
    if (t.dim() != 1 || t.size(0) != y.size(1)) {
      require(false, name, " must be [C] = [", y.size(1), "] (", main, " has ", y.size(1), " channels), got ", shape_text(t));
    }
    require(t.is_contiguous(), name, " must be contiguous, got stride ", t.stride(0));
  }
};

// channels_last if y's channels are its fastest dimension and it isn't also contiguous (then both are the same memory), else contiguous.
inline MemoryFormat format_of(const Tensor& y) {
  return y.dim() == 4 && y.stride(1) == 1 && !y.is_contiguous() ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The tensor itself where it is dense in that format, else a copy that is.
inline Tensor dense(const Tensor& t, MemoryFormat format) { return torch::stable::contiguous(t, format); }

inline Tensor empty_as(const Tensor& y, std::array<int64_t, 4> sizes, ScalarType dtype, MemoryFormat format) {
  return torch::stable::empty(sizes, dtype, std::nullopt, y.device(), std::nullopt, format);
}

inline Tensor empty_like_format(const Tensor& y, MemoryFormat format) {
  return empty_as(y, {y.size(0), y.size(1), y.size(2), y.size(3)}, y.scalar_type(), format);
}

// An uninitialised float32 [n].
inline Tensor empty_vector(const Tensor& y, int64_t n) {
  const std::array<int64_t, 1> size{n};
  return torch::stable::empty(size, ScalarType::Float, std::nullopt, y.device());
}

inline Tensor zero_vector(const Tensor& y, int64_t n) {
  Tensor out = empty_vector(y, n);
  return torch::stable::zero_(out);
}

// The tensors of scale*(x - center) + shift, checked; `prefix` names them in messages ("" or "res_").
struct AffineTensors {
  Tensor scale, center, shift;
};

inline AffineTensors check_affine(const Checker& c, const std::string& prefix, const Tensor& scale, const Tensor& center,
                                  const Tensor& shift, const Tensor& y) {
  c.vector((prefix + "scale").c_str(), scale, y);
  c.vector((prefix + "center").c_str(), center, y);
  c.vector((prefix + "shift").c_str(), shift, y);
  return {scale, center, shift};
}

// The residual's own affine: all three of res_* with a residual, or none of them.
inline std::optional<AffineTensors> check_residual(const Checker& c, const Tensor& y, const OptionalTensor& residual,
                                                   const OptionalTensor& res_scale, const OptionalTensor& res_center,
                                                   const OptionalTensor& res_shift) {
  const int given = res_scale.has_value() + res_center.has_value() + res_shift.has_value();
  c.require(given == 0 || given == 3, "res_scale, res_center and res_shift must be given together, got ", given, " of 3");
  c.require(given == 0 || residual.has_value(), "res_scale, res_center and res_shift need a residual, got none");
  if (residual) c.like("residual", *residual, y);
  if (given == 0) return std::nullopt;
  return check_affine(c, "res_", *res_scale, *res_center, *res_shift, y);
}

}  // namespace fastres
