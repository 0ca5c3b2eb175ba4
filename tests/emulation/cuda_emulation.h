// Runs CUDA kernels on the CPU: compiled by g++, one block after another, the threads of a block as fibers that take turns at barriers.
// Covers what this project's barrier kernels use: threadIdx, blockIdx, gridDim, __shared__, __syncthreads, fmaf, half conversions.
// Shared memory is filled with NaN before each block, and a thread that leaves while others wait for it at a barrier is counted out, as on
// the device.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done, waiting;
};

inline dim3 thread_index, block_index, grid_size, block_size;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current;
inline std::function<void()> body;
inline bool reversed;  // order in which threads run: results must not depend on it

inline void enter() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void barrier() {
  fibers[current].waiting = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_block() {
  for (Fiber& f : fibers) {
    f.done = f.waiting = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (size_t i = 0; i < fibers.size(); ++i) {
      current = reversed ? fibers.size() - 1 - i : i;
      Fiber& f = fibers[current];
      if (f.done) continue;
      thread_index = dim3(static_cast<unsigned>(current));
      f.waiting = false;
      swapcontext(&scheduler, &f.context);
      alive = alive || !f.done;
    }
  }
}

template <class F>
void launch(dim3 grid, dim3 block, F f) {
  grid_size = grid;
  block_size = block;
  body = f;
  fibers.resize(block.x);
  for (Fiber& f : fibers) f.stack.resize(64 << 10);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = dim3(x, y);
      run_block();
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size
#define __syncthreads emulation::barrier
#define FASTRES_LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, [=] {                   \
    (void)(stream);                                      \
    kernel(__VA_ARGS__);                                 \
  })

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline _Float16 __ushort_as_half(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint16_t __half_as_ushort(_Float16 x) {
  uint16_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __half2float(_Float16 x) { return static_cast<float>(x); }
inline _Float16 __float2half_rn(float x) { return static_cast<_Float16>(x); }
