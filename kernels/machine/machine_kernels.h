// What one thread of this machine can do at most, as functions of one
// instruction set. Each does a known amount of work; the caller takes the time.
// Nothing here knows torch.
#pragma once

#include <stdint.h>

namespace fastres {

struct MachineKernels {
  // `rounds` of independent multiply-adds on registers only; returns
  // floating-point operations, two a multiply-add. Null where the instruction
  // set has no such instruction.
  int64_t (*multiply_add)(int64_t rounds);       // float
  int64_t (*multiply_add_bf16)(int64_t rounds);  // pairs of bf16 into float (vdpbf16ps)
  int64_t (*multiply_tiles)(int64_t rounds);     // tiles of bf16 into float (tdpbf16ps)
  // Reads a buffer once, all of it, in order. bytes: a multiple of 512; p:
  // aligned to 64.
  void (*read)(const void* p, int64_t bytes);
};

}  // namespace fastres
