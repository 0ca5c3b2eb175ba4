// Registers the operators that conv.h declares.
#include "conv.h"

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("conv_refusal_cuda", TORCH_BOX(&fastres::conv_refusal));
  m.impl("conv_forward_cuda", TORCH_BOX(&fastres::conv_forward));
  m.impl("conv_backward_cuda", TORCH_BOX(&fastres::conv_backward));
}
