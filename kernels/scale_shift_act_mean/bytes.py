"""Bytes of scale_shift_act_mean's fused kernels, by the signatures of the op: see Bytes in README.md."""

from ..common.traffic import Pass, named


def forward(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> list[Pass]:
    means = y.shape[0] * y.shape[1] * y.element_size()
    return [Pass("scale_shift_act_mean", named(y=y, residual=residual), named(out=means))]


def backward(
    grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool, need_residual: bool
) -> list[Pass]:
    """``grad`` is [N, C]: scale_shift_act's kernel with a gradient that is the same at every position."""
    own = residual is not None and res_scale is not None
    passed_on = residual is not None and relu and need_residual
    reads = named(grad=grad, y=y, residual=residual if relu or own else None)
    writes = named(grad_y=y, grad_residual=residual if own or passed_on else None)
    return [Pass("scale_shift_act_mean_backward", reads, writes)]
