"""scale_shift_act_mean by Triton: allocates results and launches triton_kernel.py, and backward scale_shift_act's kernel."""

from dataclasses import replace

import torch
from torch import Tensor

from ..common.triton_conv import channels_last
from ..scale_shift_act.triton_backend import run_backward, vectors
from ..scale_shift_act.triton_kernel import PointProblem
from .triton_kernel import FORWARD_CONFIGS, forward_launch


def forward(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> Tensor:
    problem = PointProblem.of(y, residual, res_scale, relu, mean=True)
    out = torch.empty(y.shape[:2], dtype=y.dtype, device=y.device)
    main, other = vectors(scale, center, shift), vectors(res_scale, res_center, res_shift)
    rest = None if residual is None else channels_last(residual)
    forward_launch(problem, FORWARD_CONFIGS[0], channels_last(y), main, rest, other, out).run()
    return out


def backward(
    grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool, need_residual: bool
) -> tuple[Tensor, ...]:
    problem = PointProblem.of(y, residual, res_scale, relu, mean=True, keep=need_residual and relu)
    return run_backward(problem, grad.contiguous(), y, scale, center, shift, residual, res_scale, res_center, res_shift)


def masked(grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> tuple[Tensor, ...]:
    """As :func:`fastres.kernels.scale_shift_act.triton_backend.masked`, from the gradient of the means."""
    problem = replace(PointProblem.of(y, residual, res_scale, relu, mean=True), keep_residual=False, masked=True)
    dz, on_scale, on_shift, _, *others = run_backward(
        problem, grad.contiguous(), y, scale, center, shift, residual, res_scale, res_center, res_shift
    )
    return dz, on_scale, on_shift, *others
