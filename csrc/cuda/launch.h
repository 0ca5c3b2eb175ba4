// What the tensor side (*.cpp, compiled by the C++ compiler) may call of the CUDA side (compiled by nvcc).
#pragma once

#include "../../kernels/batch_norm_act/cuda_problem.h"
#include "../../kernels/conv/cuda_problem.h"
#include "../../kernels/conv_stats/cuda_shape.h"
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
const char* batch_norm_act(const NormProblem& problem, bool backward, int device, void* stream);

// The figures of a device, asked of the driver: no synchronisation.
const char* chip_of(int device, Chip* chip);

}  // namespace fastres::cuda
