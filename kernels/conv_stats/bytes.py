"""Bytes of conv_stats' fused kernels, by the signatures of the op: see Bytes in README.md.

Convolutions in groups go to the library and are not described here: they count as if they were fused.
"""

from ..common.traffic import Pass, conv_out, conv_reads, named


def forward(
    x, weight, scale, center, shift, relu: bool, stride, padding, dilation, groups: int, stats: bool
) -> list[Pass]:
    read, flops = conv_reads(x, weight, stride, padding, dilation)
    outputs = x.shape[0] * weight.shape[0] * x.element_size()
    for length, r, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        outputs *= conv_out(length, r, s, p, d)
    return [Pass("conv_stats", named(x=read, weight=weight), named(y=outputs), flops)]


def backward(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu: bool, stride, padding, dilation, groups: int, need_input: bool, need_weight: bool, addend=None, factor=None,
):  # fmt: skip
    """The input gradient reads what it makes the gradient of y from, and x for the mask and the sums of the prologue, and
    another gradient of x that it adds; the weight gradient reads both again and makes the activated input anew."""
    read, flops = conv_reads(x, weight, stride, padding, dilation)
    gradient = named(grad_y=grad_y, y=y if grad_var is not None else None)
    passes = []
    if need_input:
        reads = {**gradient, **named(weight=weight, x=x if scale is not None else None, addend=addend)}
        passes.append(Pass("conv_stats_input_gradient", reads, named(grad_x=x), flops))
    if need_weight:
        reads = {**gradient, **named(x=read)}
        passes.append(Pass("conv_stats_weight_gradient", reads, named(grad_weight=weight), flops))
    return passes
