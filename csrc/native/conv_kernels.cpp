// Compiled once per instruction set, as kernels.cpp: the convolution kernels it has, in the order of preference where nothing was measured.
#include "../../kernels/conv/cpu_amx.h"
#include "../../kernels/conv/cpu_direct.h"
#include "../../kernels/conv/cpu_grouped.h"
#include "../../kernels/conv/cpu_grouped_amx.h"
#include "../../kernels/conv/cpu_weight_gradient.h"
#include "../../kernels/conv/cpu_winograd.h"

namespace fastres::FASTRES_ISA {
namespace {

const ConvKernel* const list[] = {
    &winograd4,
#if defined(__AMX_BF16__)
    &amx,       &grouped_amx,
#endif
    &winograd2, &direct,      &grouped,
};

}  // namespace

extern const ConvKernels conv_kernels;
#if defined(__AMX_BF16__)
const ConvKernels conv_kernels = {list, sizeof list / sizeof *list, &weight_gradient};
#else
const ConvKernels conv_kernels = {list, sizeof list / sizeof *list, nullptr};
#endif

}  // namespace fastres::FASTRES_ISA
