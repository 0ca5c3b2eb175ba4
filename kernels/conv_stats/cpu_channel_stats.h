// The statistics pass of conv_stats on the CPU: mean and biased variance per channel, and the way back.
//
// Bytes, for E elements of s bytes: forward reads y once (Es); backward reads y and the gradient and writes one (3Es).
//
// Each part is read twice, the second time from the cache. The first reading finds the part's mean, relative to its first row so that a
// constant or a far-away mean costs no digits; the second takes the sums of (y - pivot) and (y - pivot)^2 with that mean as the pivot,
// so the subtraction in M2 = sum2 - sum1^2/n removes next to nothing, whatever outlier the first row holds. Parts are then merged by
// (count, mean, M2) in double (Chan, Golub and LeVeque 1983). A NaN or an infinity in a channel makes both of its results NaN.
#pragma once

#include "../common/cpu_problems.h"
#include "../common/cpu_walk.h"

namespace fastres::FASTRES_ISA {

template <class T, bool Planes, bool Squares>
struct StatsPass {
  const ChannelStats& p;
  const float* pivot;  // [C]
  Sums<T, Planes, Squares ? 2 : 1> sums;

  template <int K, bool Partial>
  __attribute__((always_inline)) void block(const Block& b) {
    const T* y = static_cast<const T*>(p.y) + b.offset;
    Vec at[K], acc[Squares ? 2 : 1][K];
    channel_load<T, Planes, Partial>(pivot, b, at);
    sums.template open<K, Partial>(b, acc);
    for (int64_t r = 0; r < b.rows; ++r) {
      Vec x[K];
      load_vectors<Partial>(y + r * b.stride, b.lanes, x);
      for (int k = 0; k < K; ++k) {
        Vec d = x[k] - at[k];
        if constexpr (Planes && Partial) {
          // Lanes past the end read as 0 and would count as -pivot, since here all lanes are summed.
          for (int64_t i = b.lanes; i < kWidth; ++i) d[i] = 0.0f;
        }
        acc[0][k] += d;
        if constexpr (Squares) acc[1][k] = fma(d, d, acc[1][k]);
      }
    }
    sums.template close<K, Partial>(b, acc);
  }
};

template <class T, bool Planes>
void channel_stats(const ChannelStats& p, int64_t begin, int64_t end) {
  const int64_t C = p.shape.channels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = Planes ? item / C : item;
    const int64_t first = Planes ? item % C : 0, last = Planes ? first + 1 : C;  // the channels of this item
    float* pivot = p.partial + part * 3 * C;                                     // [3, C]
    const int64_t n = positions_of_part(p.shape, part);
    const int64_t start = Planes ? (part / pieces_of(p.shape) * C + first) * plane_of(p.shape) + part % pieces_of(p.shape) * kPieceElements
                                 : part * rows_per_part(p.shape) * C;
    for (int64_t c = first; c < last; ++c) pivot[c] = to_float(static_cast<const T*>(p.y)[start + c - first]);

    StatsPass<T, Planes, false> mean{p, pivot, Sums<T, Planes, 1>::begin(pivot + C, C)};
    walk<Planes>(p.shape, item, mean);
    mean.sums.end(first);
    const float share = 1.0f / static_cast<float>(n);
    for (int64_t c = first; c < last; ++c) pivot[c] += pivot[C + c] * share;

    StatsPass<T, Planes, true> both{p, pivot, Sums<T, Planes, 2>::begin(pivot + C, C)};
    walk<Planes>(p.shape, item, both);
    both.sums.end(first);
  }
}

// Merges the parts for the channels [begin, end): mean [C] and biased variance [C]. No elements at all give NaN, like torch.var.
// count_of(part, i): positions of channel first + i in a part; rows: pivot, sum (y - pivot) and sum (y - pivot)^2 lie `channels` apart.
template <class CountOf>
FASTRES_INLINE void merge_moments(const float* rows, int64_t parts, int64_t part_stride, int64_t channels, int64_t begin, int64_t end,
                                  CountOf count_of, float* mean_out, float* var_out) {
  for (int64_t first = begin; first < end; first += kMergeChannels) {
    const int64_t width = min64(kMergeChannels, end - first);
    double count[kMergeChannels] = {}, mean[kMergeChannels] = {}, m2[kMergeChannels] = {};
    for (int64_t part = 0; part < parts; ++part) {
      const float* pivot = rows + part * part_stride + first;  // [3, C] from channel `first` on
      for (int64_t i = 0; i < width; ++i) {
        const double n = count_of(part, first + i);
        if (n == 0) continue;
        const double total = count[i] + n, each = 1.0 / n, s1 = pivot[channels + i], delta = pivot[i] + s1 * each - mean[i];
        mean[i] += delta * (n / total);
        m2[i] += (pivot[2 * channels + i] - s1 * s1 * each) + delta * delta * (count[i] * n / total);
        count[i] = total;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      const double var = m2[i] / count[i];  // 0/0 without elements
      mean_out[first + i] = static_cast<float>(count[i] > 0 ? mean[i] : var);
      var_out[first + i] = static_cast<float>(var < 0 ? 0.0 : var);  // rounding can leave a tiny negative one; NaN stays
    }
  }
}

static inline void channel_stats_merge(const ChannelStats& p, int64_t begin, int64_t end, float* mean_out, float* var_out) {
  const int64_t C = p.shape.channels;
  const auto count = [&p](int64_t part, int64_t) { return static_cast<double>(positions_of_part(p.shape, part)); };
  merge_moments(p.partial, parts_of(p.shape), 3 * C, C, begin, end, count, mean_out, var_out);
}

// The same for the rows that a convolution's tasks leave, [tasks, 4, C]: count, pivot and the two sums; a task has a part of the channels.
static inline void task_stats_merge(const float* rows, int64_t tasks, int64_t channels, int64_t begin, int64_t end, float* mean_out,
                                    float* var_out) {
  const auto count = [=](int64_t task, int64_t c) { return static_cast<double>(rows[task * 4 * channels + c]); };
  merge_moments(rows + channels, tasks, 4 * channels, channels, begin, end, count, mean_out, var_out);
}

// out = grad_y + offset + slope*(y - mean)
template <class T, bool Planes, bool HasGrad>
struct StatsBackward {
  const ChannelStatsBackward& p;

  template <int K, bool Partial>
  __attribute__((always_inline)) void block(const Block& b) const {
    const T* y = static_cast<const T*>(p.y) + b.offset;
    const T* grad = static_cast<const T*>(p.grad_y) + (HasGrad ? b.offset : 0);
    T* out = static_cast<T*>(p.out) + b.offset;
    Vec mean[K], offset[K], slope[K];
    channel_load<T, Planes, Partial>(p.mean, b, mean);
    channel_load<T, Planes, Partial>(p.offset, b, offset);
    channel_load<T, Planes, Partial>(p.slope, b, slope);
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t at = r * b.stride;
      Vec x[K], g[K] = {};
      load_vectors<Partial>(y + at, b.lanes, x);
      if constexpr (HasGrad) load_vectors<Partial>(grad + at, b.lanes, g);
      for (int k = 0; k < K; ++k) g[k] += fma(slope[k], x[k] - mean[k], offset[k]);
      store_vectors<Partial>(out + at, g, b.lanes);
    }
  }
};

template <class T, bool Planes, bool HasGrad>
void channel_stats_backward(const ChannelStatsBackward& p, int64_t begin, int64_t end) {
  StatsBackward<T, Planes, HasGrad> body{p};
  for (int64_t item = begin; item < end; ++item) walk<Planes>(p.shape, item, body);
}

}  // namespace fastres::FASTRES_ISA
