// The CUDA convolution forward as a C library, for tests/test_cuda_conv_forward.py.
#include "cuda_emulation.h"

#include "../../kernels/conv/cuda_forward_launch.cuh"

using namespace fastres::cuda;

namespace {
void run(const ConvForward* p, TileShape tile) {
  switch (p->type) {
    case Type::float16: return launch_forward_type<Half, false>(*p, tile, nullptr);
    case Type::bfloat16: return launch_forward_type<BFloat, false>(*p, tile, nullptr);
    case Type::float32: break;
  }
  p->precision == Precision::tf32 ? launch_forward_type<float, false>(*p, tile, nullptr)
                                  : launch_forward_type<float, true>(*p, tile, nullptr);
}
}  // namespace

extern "C" {

void conv_forward(const ConvForward* p) { run(p, forward_tile(*p)); }
void conv_forward_small(const ConvForward* p) { run(p, TileShape::small); }
void conv_forward_tall(const ConvForward* p) { run(p, TileShape::tall); }
void conv_forward_large(const ConvForward* p) { run(p, TileShape::large); }

int64_t conv_forward_size() { return sizeof(ConvForward); }
int64_t forward_workspace_of(const ConvForward* p) { return forward_workspace(*p); }
int64_t forward_tile_of(const ConvForward* p) { return static_cast<int64_t>(forward_tile(*p)); }
const char* refusal_of(const Geometry* g) { return refusal(*g); }
}
