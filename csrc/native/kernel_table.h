// The kernels of one instruction set: launchers that take a problem and a range of items.
#pragma once

#include "../../kernels/common/cpu_problems.h"
#include "../../kernels/conv/cpu_conv.h"
#include "../../kernels/machine/machine_kernels.h"
#include "../../kernels/plan_steps/plan_problems.h"

namespace fastres {

struct KernelTable {
  void (*scale_shift_act)(const ScaleShiftAct&, int64_t begin, int64_t end);
  void (*scale_shift_act_backward)(const ScaleShiftActBackward&, int64_t begin, int64_t end);
  void (*scale_shift_act_pool)(const ScaleShiftActPool&, int64_t begin, int64_t end);
  void (*scale_shift_act_pool_gather)(const ScaleShiftActPool&, int64_t begin, int64_t end);
  void (*scale_shift_act_pool_backward)(const ScaleShiftActPoolBackward&, int64_t begin, int64_t end);
  void (*channel_stats)(const ChannelStats&, int64_t begin, int64_t end);
  void (*channel_stats_merge)(const ChannelStats&, int64_t begin, int64_t end, float* mean, float* var);
  void (*task_stats_merge)(const float* rows, int64_t tasks, int64_t channels, int64_t begin, int64_t end, float* mean, float* var);
  void (*sum_parts)(const float* partial, int64_t parts, int64_t rows, int64_t row, int64_t channels, int64_t begin, int64_t end,
                    float* out);
  void (*channel_stats_backward)(const ChannelStatsBackward&, int64_t begin, int64_t end);
  const ConvKernels& conv;
  void (*map_input)(const MapInput&, int64_t begin, int64_t end);
  void (*map_max_pool)(const MapPool&, int64_t begin, int64_t end);
  void (*map_mean_pool)(const MapPool&, int64_t begin, int64_t end);
  void (*map_place)(const MapPlace&, int64_t begin, int64_t end);
  const MachineKernels* machine;
};

}  // namespace fastres
