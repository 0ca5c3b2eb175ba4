"""Bytes of scale_shift_act's fused kernels, by the signatures of the op: see Bytes in README.md."""

from ..common.traffic import Pass, named


def forward(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> list[Pass]:
    return [Pass("scale_shift_act", named(y=y, residual=residual), named(out=y))]


def backward(
    grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool, need_residual: bool
) -> list[Pass]:
    own = residual is not None and res_scale is not None
    passed_on = residual is not None and relu and need_residual  # without ReLU the residual's gradient is grad itself
    reads = named(grad=grad, y=y, residual=residual if relu or own else None)
    return [
        Pass("scale_shift_act_backward", reads, named(grad_y=y, grad_residual=residual if own or passed_on else None))
    ]


def masked(grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> list[Pass]:
    """The backward that writes dz alone, which whoever reads it scales."""
    reads = named(grad=grad, y=y, residual=residual if relu or res_scale is not None else None)
    return [Pass("scale_shift_act_backward", reads, named(grad_y=y))]
