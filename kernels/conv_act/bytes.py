"""Bytes of conv_act's fused kernels, by the signatures of the op: see Bytes in README.md."""

from ..common.traffic import Pass, conv_out, conv_reads, named


def forward(x, weight, bias, residual, relu: bool, stride, padding, dilation, groups: int) -> list[Pass]:
    read, flops = conv_reads(x, weight, stride, padding, dilation)
    outputs = x.shape[0] * weight.shape[0] * x.element_size()
    for length, r, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        outputs *= conv_out(length, r, s, p, d)
    return [Pass("conv_act", named(x=read, weight=weight, residual=residual), named(out=outputs), flops)]
