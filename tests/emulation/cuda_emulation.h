// Runs CUDA kernels on the CPU: compiled by g++, the threads of a block are fibers that take turns where they wait for each other.
//
// A test's .cpp includes this before the kernels' headers; tests/emulation/cuda.py compiles it together with device/*.cpp.
//   device/runtime.h     what kernels ask of the runtime: barriers, warp collectives, copies, errors
//   device/launch.h      FASTRES_LAUNCH and FASTRES_LAUNCH_COOPERATIVE: run the blocks, or record the launch
//   device/intrinsics.h  CUDA's built-in functions
//   device/fibers.cpp    the fibers and their schedules
//   device/shared.cpp    static and dynamic shared memory
//   device/launches.cpp  the launch of a grid, and what Python calls
//   device/warps.cpp     shuffles, votes, matrix loads and matrix products
//   device/copies.cpp    asynchronous copies
//   device/checks.cpp    errors: what the compiler's own checks find, segmentation faults
#pragma once

#include "device/intrinsics.h"
#include "device/launch.h"
#include "device/runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Thread-local variables of one library lie side by side, so the runtime can find all static shared memory and poison it. The sanitizers
// guard ordinary variables better.
#ifdef FASTRES_SANITIZED
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#define threadIdx emulation::here->thread
#define blockIdx emulation::here->block
#define gridDim emulation::grid_size
#define blockDim emulation::block_size
#define warpSize 32
