"""Bytes of scale_shift_act_pool's fused kernels, by the signatures of the op: see Bytes in README.md."""

from ..common.traffic import Pass, conv_out, named, touched_positions


def _pooled(y, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """(outputs of the pool, bytes of y that some window covers)."""
    n, c, *lengths = y.shape
    outputs = covered = n * c
    for length in lengths:
        out = conv_out(length, kernel, stride, padding, 1)
        outputs *= out
        covered *= touched_positions(length, out, kernel, stride, padding, 1)
    return outputs, covered * y.element_size()


def forward(y, scale, center, shift, relu: bool, kernel: int, stride: int, padding: int) -> list[Pass]:
    outputs, covered = _pooled(y, kernel, stride, padding)
    return [Pass("scale_shift_act_pool", named(y=covered), named(out=outputs * y.element_size(), index=outputs))]


def backward(grad, index, y, scale, center, shift, relu: bool, kernel: int, stride: int, padding: int) -> list[Pass]:
    return [Pass("scale_shift_act_pool_backward", named(grad=grad, index=index, y=y), named(grad_y=y))]


def gather(y, scale, center, shift, index, relu: bool, kernel: int, stride: int, padding: int) -> list[Pass]:
    """The maxima lie anywhere: at least one of y's lines for every output, at most all of y."""
    out = index.numel() * y.element_size()
    return [Pass("scale_shift_act_pool_gather", named(y=y, index=index), named(out=out))]
