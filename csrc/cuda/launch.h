// What the tensor side (*.cpp, compiled by the C++ compiler) may call of the CUDA side (compiled by nvcc).
#pragma once

#include "../../kernels/conv/cuda_problem.h"
#include "../../kernels/conv_stats/cuda_weight_shape.h"
#include "../../kernels/scale_shift_act/cuda_problem.h"

namespace fastres::cuda {

// Queue the kernels on the stream (cudaStream_t) of that device. The result is null, or CUDA's words for what went wrong.
const char* scale_shift_act(const PointProblem& problem, int device, void* stream);
const char* scale_shift_act_backward(const PointProblem& problem, int device, void* stream);
const char* scale_shift_act_masked(const PointProblem& problem, int device, void* stream);
const char* conv_forward(const ConvForward& problem, int device, void* stream);
const char* conv_input_gradient(const ConvBackward& problem, int device, void* stream);
const char* conv_weight_gradient(const ConvBackward& problem, int device, void* stream);

// Floats of ConvBackward::workspace for the input gradient; weight_gradient_workspace() is inline. Everything else of the problem is set.
int64_t input_gradient_workspace(const ConvBackward& problem);

}  // namespace fastres::cuda
