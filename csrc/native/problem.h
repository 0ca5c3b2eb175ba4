// From checked tensors to what the CPU kernels take, and the loop over their items on torch's thread pool.
#pragma once

#include <memory>
#include <vector>

#include "../common/tensors.h"
#include "cpu.h"

namespace fastres {

constexpr std::initializer_list<ScalarType> kCpuTypes = {ScalarType::Float, ScalarType::BFloat16};

inline Shape shape_of(const Tensor& y, MemoryFormat format) {
  Shape s{y.size(0), y.size(1), y.size(2), y.size(3), format == MemoryFormat::Contiguous};
  // One position a plane: contiguous and channels_last are the same memory, and rows of channels are the longer vectors.
  if (plane_of(s) == 1) s.planes = false;
  return s;
}

inline Affine pointers(const AffineTensors& t) {
  return {t.scale.const_data_ptr<float>(), t.center.const_data_ptr<float>(), t.shift.const_data_ptr<float>()};
}

// What the gradients of mean and variance over n positions add to the gradient of y: offset + slope*(y - mean), per channel.
struct StatisticsShare {
  std::vector<float> offset, slope;

  StatisticsShare() = default;
  StatisticsShare(const OptionalTensor& grad_mean, const OptionalTensor& grad_var, int64_t channels, double n)
      : offset(channels, 0.0f), slope(channels, 0.0f) {
    for (int64_t i = 0; i < channels; ++i) {
      if (grad_mean) offset[i] = static_cast<float>(grad_mean->const_data_ptr<float>()[i] / n);
      if (grad_var) slope[i] = static_cast<float>(2.0 * grad_var->const_data_ptr<float>()[i] / n);
    }
  }
};

inline bool is_bfloat16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

// Scratch that nobody sees: [n] floats, not initialised.
inline std::unique_ptr<float[]> scratch(int64_t n) { return std::unique_ptr<float[]>(new float[static_cast<size_t>(max64(1, n))]); }

// Runs launcher(problem, begin, end) over [0, items) in tasks of at least about 32,768 elements, on torch's pool.
template <class Problem>
void run_items(void (*launcher)(const Problem&, int64_t, int64_t), const Problem& problem, int64_t items, int64_t elements_per_item) {
  if (items <= 0 || elements_per_item <= 0) return;
  const int64_t grain = max64(1, kPartElements / elements_per_item);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { launcher(problem, begin, end); });
}

// Runs f(begin, end) over ranges of channels, for merging `parts` parts.
template <class F>
void over_channels(int64_t channels, int64_t parts, const F& f) {
  if (channels <= 0) return;
  torch::stable::parallel_for(0, channels, max64(16, kPartElements / max64(1, parts)), f);
}

inline void add_parts(const float* partial, const Shape& s, int64_t rows, int64_t row, const Tensor& out) {
  float* result = out.mutable_data_ptr<float>();
  const int64_t parts = rows_of(s) > 0 ? parts_of(s) : 0;
  over_channels(s.channels, parts,
                [&](int64_t begin, int64_t end) { kernels().sum_parts(partial, parts, rows, row, s.channels, begin, end, result); });
}

}  // namespace fastres
