// Where a CUDA operator runs, and how torch's tensors become the pointers of the problems.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../../kernels/common/cuda_types.h"
#include "../common/tensors.h"

namespace fastres {

#ifndef FASTRES_EMULATED
// The device of `t`, current while this lives, and torch's current stream there.
class Place {
 public:
  explicit Place(const Tensor& t)
      : device(t.get_device_index()), guard_(device), stream_(torch::stable::accelerator::getCurrentStream(device)) {}
  void* stream() const { return stream_.nativeHandle(); }
  const int device;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
};
#else
// Tests on the CPU: the tensors are in its memory, and launches run at once.
struct Place {
  explicit Place(const Tensor&) {}
  void* stream() const { return nullptr; }
  const int device = 0;
};
#endif

constexpr std::initializer_list<ScalarType> kCudaFloats = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

inline cuda::Type cuda_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float  ? cuda::Type::float32
         : t.scalar_type() == ScalarType::Half ? cuda::Type::float16
                                               : cuda::Type::bfloat16;
}

inline cuda::Affine cuda_affine(const std::optional<AffineTensors>& t) {
  if (!t) return {nullptr, nullptr, nullptr};
  return {t->scale.const_data_ptr<float>(), t->center.const_data_ptr<float>(), t->shift.const_data_ptr<float>()};
}

}  // namespace fastres
