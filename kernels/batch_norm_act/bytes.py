"""Bytes of batch_norm_act's fused kernels, by the signatures of the op: see Bytes in README.md."""

from ..common.traffic import Pass, named


def forward(y, weight, bias, residual, eps: float, relu: bool) -> list[Pass]:
    return [Pass("batch_norm_act", named(y=y, residual=residual), named(out=y))]


def backward(grad, y, weight, bias, residual, mean, var, eps: float, relu: bool, need_residual: bool) -> list[Pass]:
    passed_on = residual is not None and relu and need_residual  # without ReLU the residual's gradient is grad itself
    reads = named(grad=grad, y=y, residual=residual if relu else None)
    writes = named(grad_y=y, grad_residual=residual if passed_on else None)
    return [Pass("batch_norm_act_backward", reads, writes)]
