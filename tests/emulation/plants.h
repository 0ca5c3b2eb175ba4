// Errors that can be planted into the sample kernels, by a number in their problems; tests/test_cuda_emulation.py has the same names.
#pragma once

#include "kernels/common/cuda_device.cuh"

namespace samples {

enum Plant : int {
  kNothing,
  kNoBarrierAfterWait,   // the tiles' copies are read without a barrier
  kNoBarrierBeforeCopy,  // the next copies may overtake a warp that still reads: a write after a read
  kWaitForTooFew,        // one group too many may be under way
  kGuardOffByOne,        // one row or column past the end is read
  kWrongFragment,        // operand b's registers are swapped
  kMisaligned,           // a vector is stored one element off
  kDivergentBarrier,     // a part of the threads comes to a barrier
  kSharedOverflow,       // one element past the end of shared memory is written
  kNoBarrierBeforeSum,   // partial sums are read before all are there
  kNoBarrierInTree,      // the same in the loop that halves them
  kNarrowShuffle,        // the first step of the shuffles is left out
  kDivergentShuffle,     // a part of the warp comes to a shuffle
};

}  // namespace samples
