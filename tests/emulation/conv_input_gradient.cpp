// The kernels of conv_stats' input gradient as a C library, for tests/test_cuda_input_gradient.py.
#include "cuda_emulation.h"

#include "../../kernels/conv_stats/cuda_input_gradient_launch.cuh"

using namespace fastres::cuda;

namespace {
void run(const ConvBackward* p, TileShape tile) {
  switch (p->type) {
    case Type::float16: return launch_input_gradient_type<Half, false>(*p, tile, nullptr);
    case Type::bfloat16: return launch_input_gradient_type<BFloat, false>(*p, tile, nullptr);
    case Type::float32: break;
  }
  p->precision == Precision::tf32 ? launch_input_gradient_type<float, false>(*p, tile, nullptr)
                                  : launch_input_gradient_type<float, true>(*p, tile, nullptr);
}
}  // namespace

extern "C" {

void input_gradient(const ConvBackward* p) { run(p, input_gradient_tile(*p)); }
void input_gradient_small(const ConvBackward* p) { run(p, TileShape::small); }
void input_gradient_tall(const ConvBackward* p) { run(p, TileShape::tall); }
void input_gradient_large(const ConvBackward* p) { run(p, TileShape::large); }

int64_t conv_backward_size() { return sizeof(ConvBackward); }
int64_t input_gradient_workspace_of(const ConvBackward* p) { return input_gradient_workspace(*p); }
int64_t input_gradient_workspace_of_128_rows(const ConvBackward* p) {
  return merge_workspace(input_gradient_tiles(p->shape, 128), p->shape.channels);
}
int64_t input_gradient_tile_of(const ConvBackward* p) { return static_cast<int64_t>(input_gradient_tile(*p)); }
const char* input_gradient_refusal_of(const Geometry* g) { return input_gradient_refusal(*g); }
}
