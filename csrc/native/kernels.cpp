// Compiled once per instruction set (FASTRES_ISA names it): picks the template instance for a problem's flags.
// Includes neither torch nor the C++ standard library; see kernels/common/cpu_vec.h for why.
#include "../../kernels/conv_stats/cpu_channel_stats.h"
#include "../../kernels/machine/cpu_limits.h"
#include "../../kernels/plan_steps/cpu_copy.h"
#include "../../kernels/plan_steps/cpu_pool.h"
#include "../../kernels/scale_shift_act/cpu_scale_shift_act.h"
#include "../../kernels/scale_shift_act_pool/cpu_scale_shift_act_pool.h"
#include "kernel_table.h"

namespace fastres::FASTRES_ISA {
namespace {

template <class T>
struct Type {
  using type = T;
};
template <auto Value>
struct Constant {
  static constexpr auto value = Value;
};

// Each with_* turns one run-time flag into a compile-time one.
template <class F>
void with_bool(bool flag, F f) {
  flag ? f(Constant<true>{}) : f(Constant<false>{});
}
template <class F>
void with_format(bool bfloat16, bool planes, F f) {
  with_bool(planes, [&](auto is_planes) { bfloat16 ? f(Type<bf16>{}, is_planes) : f(Type<float>{}, is_planes); });
}
template <class F>
void with_residual(Residual kind, F f) {
  switch (kind) {
    case Residual::none: return f(Constant<Residual::none>{});
    case Residual::plain: return f(Constant<Residual::plain>{});
    case Residual::affine: return f(Constant<Residual::affine>{});
  }
}

void forward(const ScaleShiftAct& p, int64_t begin, int64_t end) {
  with_format(p.bfloat16, p.shape.planes, [&](auto type, auto planes) {
    with_residual(p.residual_kind, [&](auto kind) {
      with_bool(p.relu,
                [&](auto relu) { scale_shift_act<typename decltype(type)::type, planes.value, kind.value, relu.value>(p, begin, end); });
    });
  });
}

void backward(const ScaleShiftActBackward& p, int64_t begin, int64_t end) {
  with_format(p.bfloat16, p.shape.planes, [&](auto type, auto planes) {
    with_residual(p.residual_kind, [&](auto kind) {
      with_bool(p.relu, [&](auto relu) {
        using T = typename decltype(type)::type;
        if constexpr (kind.value == Residual::none) {
          scale_shift_act_backward<T, planes.value, kind.value, relu.value, false>(p, begin, end);
        } else {
          with_bool(p.grad_residual != nullptr,
                    [&](auto want) { scale_shift_act_backward<T, planes.value, kind.value, relu.value, want.value>(p, begin, end); });
        }
      });
    });
  });
}

template <bool Gather>
void pool(const ScaleShiftActPool& p, int64_t begin, int64_t end) {
  with_format(p.bfloat16, p.shape.planes, [&](auto type, auto planes) {
    with_bool(p.relu,
              [&](auto relu) { scale_shift_act_pool<Gather, typename decltype(type)::type, planes.value, relu.value>(p, begin, end); });
  });
}

void pool_backward(const ScaleShiftActPoolBackward& p, int64_t begin, int64_t end) {
  with_format(p.bfloat16, p.shape.planes, [&](auto type, auto planes) {
    with_bool(p.relu,
              [&](auto relu) { scale_shift_act_pool_backward<typename decltype(type)::type, planes.value, relu.value>(p, begin, end); });
  });
}

void stats(const ChannelStats& p, int64_t begin, int64_t end) {
  with_format(p.bfloat16, p.shape.planes,
              [&](auto type, auto planes) { channel_stats<typename decltype(type)::type, planes.value>(p, begin, end); });
}

void stats_backward(const ChannelStatsBackward& p, int64_t begin, int64_t end) {
  with_format(p.bfloat16, p.shape.planes, [&](auto type, auto planes) {
    with_bool(p.grad_y != nullptr,
              [&](auto has_grad) { channel_stats_backward<typename decltype(type)::type, planes.value, has_grad.value>(p, begin, end); });
  });
}

}  // namespace

extern const ConvKernels conv_kernels;  // conv_kernels.cpp
extern const KernelTable kernel_table;
const KernelTable kernel_table = {
    forward,   backward,       pool<false>,  pool<true>, pool_backward, stats,         channel_stats_merge, task_stats_merge,
    sum_parts, stats_backward, conv_kernels, map_input,  map_max_pool,  map_mean_pool, map_place,           &machine_kernels};

}  // namespace fastres::FASTRES_ISA
