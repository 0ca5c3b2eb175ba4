// Which instruction set the CPU kernels use: chosen once, when the library is loaded.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace fastres {

struct Isa {
  std::string name;                    // the chosen one; empty when `error` is not
  std::string error;                   // why FASTRES_ISA can't be honoured; empty when all is well
  std::vector<std::string> supported;  // what this build has and this CPU can run, lowest first
};

const Isa& isa();

// The chosen kernels. Throws std::runtime_error with isa().error when there is one.
const KernelTable& kernels();

}  // namespace fastres
