// The kernels of conv_stats' input gradient as a C library, for tests/test_cuda_input_gradient.py.
#include "cuda_emulation.h"

#include "kernels/conv_stats/cuda_input_gradient_launch.cuh"

using namespace fastres::cuda;

#ifndef FASTRES_SMALL_HALF
namespace {
template <int Rows, int Columns, int WarpRows, int WarpColumns>
void with_tile(const ConvBackward& p) {
  if (p.type == Type::float16) {
    launch_input_gradient_tile<Tile<Half, false, Rows, Columns, WarpRows, WarpColumns, 3>>(p, nullptr);
  } else {
    launch_input_gradient_tile<Tile<BFloat, false, Rows, Columns, WarpRows, WarpColumns, 3>>(p, nullptr);
  }
}
}  // namespace
#endif

extern "C" {

#ifdef FASTRES_SMALL_HALF  // compiles fast: what the tests of broken kernels need
void input_gradient(const ConvBackward* p) { launch_input_gradient_tile<Tile<Half, false, 64, 64, 32, 32, 3>>(*p, nullptr); }
#else
void input_gradient(const ConvBackward* p) {
  switch (p->type) {
    case Type::float16: return launch_input_gradient_type<Half, false>(*p, nullptr);
    case Type::bfloat16: return launch_input_gradient_type<BFloat, false>(*p, nullptr);
    case Type::float32: break;
  }
  p->precision == Precision::tf32 ? launch_input_gradient_type<float, false>(*p, nullptr)
                                  : launch_input_gradient_type<float, true>(*p, nullptr);
}
// Tiles that only large problems get.
void input_gradient_tall(const ConvBackward* p) { with_tile<128, 64, 32, 64>(*p); }
void input_gradient_large(const ConvBackward* p) { with_tile<128, 128, 32, 64>(*p); }
#endif

int64_t workspace(const ConvBackward* p) { return input_gradient_workspace(*p); }
int64_t workspace_of_128_rows(const ConvBackward* p) { return merge_workspace(input_gradient_tiles(p->shape, 128), p->shape.channels); }
int64_t tile(const ConvBackward* p) { return static_cast<int64_t>(input_gradient_tile(*p)); }
uint64_t problem_size() { return sizeof(ConvBackward); }
}
