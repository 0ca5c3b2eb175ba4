// conv_stats' weight gradient in CUDA as a C library, for tests/test_cuda_weight_gradient.py. FASTRES_FEW: two of the kernels only.
#include "cuda_emulation.h"

#include "kernels/conv_stats/cuda_weight_gradient_launch.cuh"

using namespace fastres::cuda;

extern "C" {

void weight_gradient(const ConvBackward* p) {
#ifdef FASTRES_FEW
  using Small = Tile<Half, false, 64, 64, 32, 32, 3>;
  const WeightPlan plan = weight_plan_of(*p, weight_gradient_flat(*p), TileShape::small);
  plan.flat ? launch_weight_gradient<Small, Combined<true>, Activation, true>(*p, plan, nullptr)
            : launch_weight_gradient<Small, Combined<true>, Activation, false>(*p, plan, nullptr);
#else
  switch (p->type) {
    case Type::float16: return launch_weight_gradient_type<Half, false>(*p, nullptr);
    case Type::bfloat16: return launch_weight_gradient_type<BFloat, false>(*p, nullptr);
    case Type::float32: break;
  }
  p->precision == Precision::tf32 ? launch_weight_gradient_type<float, false>(*p, nullptr)
                                  : launch_weight_gradient_type<float, true>(*p, nullptr);
#endif
}

int64_t workspace(const ConvBackward* p) { return weight_gradient_workspace(*p); }
void plan(const ConvBackward* p, int64_t* out) {
  const WeightPlan plan = weight_plan(*p);
  const int64_t all[] = {plan.flat, static_cast<int64_t>(plan.tile), plan.row_tiles, plan.column_tiles, plan.steps, plan.splits, plan.each};
  for (const int64_t number : all) *out++ = number;
}
uint32_t quotient(uint32_t n, int divisor) { return divide(n, divisor_of(divisor)); }
uint64_t problem_size() { return sizeof(ConvBackward); }
}
