"""Bytes of PyTorch's own operations, each a kernel of its own: what a plain network moves (level L0).

BatchNorm reads its input twice forward (statistics, normalising), and input and gradient twice backward. Everything
else reads its maps once and writes its results once. Views and detached tensors move nothing, nor do [C] vectors count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastres.kernels.common.traffic import Pass, conv_reads, named, size

_FREE = {"detach", "view", "_unsafe_view", "expand", "alias", "t", "squeeze", "unsqueeze", "as_strided", "as_strided_",
         "empty_like", "new_empty_strided", "device", "permute", "reshape", "slice"}  # fmt: skip


def of(name: str, arguments: Sequence[Any], result: Any) -> list[Pass]:
    """The passes of one ATen operation: ``name`` without namespace and overload, its arguments and its result."""
    if name in _FREE:
        return []
    formula = _FORMULAS.get(name)
    return formula(*arguments) if formula is not None else _once(name, arguments, result)


def _maps(values: Any) -> list[Tensor]:
    """The tensors with a batch: vectors and scalars are left out."""
    values = values if isinstance(values, tuple | list) else (values,)
    return [v for v in values if isinstance(v, Tensor) and v.dim() > 1]


def _once(name: str, arguments: Sequence[Any], result: Any) -> list[Pass]:
    reads = {f"input{i}": float(size(t)) for i, t in enumerate(_maps(list(arguments)))}
    writes = {f"result{i}": float(size(t)) for i, t in enumerate(_maps(result))}
    return [Pass(name, reads, writes)] if reads or writes else []


def _convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> list[Pass]:
    read, flops = conv_reads(x, weight, stride, padding, dilation)
    outputs = flops / (2 * weight.shape[1] * weight.shape[2] * weight.shape[3]) * x.element_size()
    return [Pass("convolution", named(x=read, weight=weight), {"y": outputs}, flops)]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> list[Pass]:
    need_input, need_weight, *_ = rest[-1]
    read, flops = conv_reads(x, weight, stride, padding, dilation)
    passes = []
    if need_input:
        passes.append(Pass("input gradient", named(grad=grad, weight=weight), named(grad_x=x), flops))
    if need_weight:
        passes.append(Pass("weight gradient", named(grad=grad, x=read), named(grad_weight=weight), flops))
    return passes


def _batch_norm(x: Tensor, *rest: Any) -> list[Pass]:
    return [Pass("statistics", named(x=x)), Pass("normalise", named(x=x), named(y=x))]


def _batch_norm_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Pass]:
    return [Pass("sums", named(grad=grad, x=x)), Pass("normalise backward", named(grad=grad, x=x), named(grad_x=x))]


def _product(bias_or_a: Tensor, a_or_b: Tensor, *rest: Any) -> list[Pass]:
    """mm(a, b) and addmm(bias, a, b): one factor is a weight or a map; both count as maps, they are small here."""
    a, b = (a_or_b, rest[0]) if rest and isinstance(rest[0], Tensor) else (bias_or_a, a_or_b)
    out = a.shape[0] * b.shape[1]
    return [Pass("product", named(a=a, b=b), {"out": out * a.element_size()}, 2 * out * a.shape[1])]


_FORMULAS: dict[str, Callable[..., list[Pass]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "cudnn_batch_norm_backward": _batch_norm_backward,
    "mm": _product,
    "addmm": _product,
}
