// A barrier between the blocks of a cooperative launch, or between some of them.
#pragma once

#include "cuda_device.cuh"

namespace fastres::cuda {

// A word that other blocks change, read anew each time.
FASTRES_DEVICE unsigned look(const unsigned* word) {
#ifdef __CUDACC__
  return *static_cast<const volatile unsigned*>(word);
#else
  return __ldcg(word);
#endif
}

// Waits until all `blocks` blocks that share `word` are here; what any of their threads wrote before is seen by all after. One of them
// says that it is the first.
//
// Every arrival adds 1, but the first block's adds 2^31 - (blocks - 1): together 2^31, so the top bit is the generation and the bits below
// are 0 again once all have come. A word that starts as 0 therefore serves any number of barriers and launches, one after another.
FASTRES_DEVICE void wait_for_blocks(unsigned* word, unsigned blocks, bool first) {
  constexpr unsigned kGeneration = 0x80000000u;
  __syncthreads();  // every thread of this block has written
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned before = atomicAdd(word, first ? kGeneration - (blocks - 1) : 1u);
    while (((before ^ look(word)) & kGeneration) == 0) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace fastres::cuda
