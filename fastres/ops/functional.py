"""The public, stateless API of the ops: checks, autocast, backend choice. Shapes: N images, C channels in, K out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastres import backends
from fastres.errors import InputError
from fastres.kernels.bn_coefficients.reference import forward as bn_coefficients

from . import recipes
from .autograd import Factor, JoinedConvStats, JoinedPoint
from .checks import Size2, autocast, check_conv, check_map, check_residual, check_vectors, checked_point, pair
from .schemas import MASKED, overload

__all__ = [
    "batch_norm_act",
    "bn_coefficients",
    "conv_act",
    "conv_stats",
    "end_conv_stats",
    "forked_conv_stats",
    "scale_shift_act",
    "scale_shift_act_mean",
    "scale_shift_act_pool",
]


def conv_stats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    center: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    stats: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of an activation that is applied on the fly, with the statistics of its result.

    Args:
        x: [N, C, H, W], fp32, bf16, fp16 or fp64.
        weight: [K, C/groups, R, S], dtype of ``x``.
        scale, center, shift: [C] each, or all None. The input becomes ``act(scale·(x − center) + shift)``; ``act`` is
            ReLU if ``relu``. Zero padding is applied after that. ``center`` is a constant to autograd.
        stride, padding, dilation: int or pair.
        stats: whether to take the statistics; without them ``mean`` and ``var`` are empty.

    Returns:
        y [N, K, P, Q] in the dtype of ``x``; mean [K] and biased variance [K] over N·P·Q in float32 (float64 for fp64).

    Raises:
        InputError: wrong shapes, dtypes or devices. BackendError: a requested backend can't serve.
    """
    arguments, backend = _conv_stats(x, weight, (scale, center, shift), relu, stride, padding, dilation, groups, stats)
    return overload("conv_stats", backend)(*arguments)


def _conv_stats(
    x: Tensor,
    weight: Tensor,
    vectors: Sequence[Tensor | None],
    relu: bool,
    stride: Size2,
    padding: Size2,
    dilation: Size2,
    groups: int,
    stats: bool,
) -> tuple[tuple[Any, ...], str]:
    """(arguments of the op, backend), if everything fits together."""
    x, weight = autocast(x, weight)  # type: ignore[assignment]
    check_conv("conv_stats", x, weight, groups)
    check_vectors("conv_stats", x, x.shape[1], **dict(zip(("scale", "center", "shift"), vectors, strict=True)))
    conv = backends.Geometry(tuple(weight.shape), pair(stride), pair(padding), pair(dilation), groups)
    backend = backends.select("conv_stats", x, conv).backend
    return (x, weight, *vectors, relu, *conv[1:], stats), backend


# The backends whose gradient kernels add a further gradient and scale dz as they read it: without them nodes gain nothing.
JOINING = ("triton", "cuda")


def _joins(backend: str) -> bool:
    """Whether nodes of our own may stand in autograd's graph: with gradients, and not where a compiler or a transform of
    functions looks on, which see plain ops."""
    return (
        backend in JOINING
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def forked_conv_stats(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`conv_stats` of an input that something else reads as well, a block's shortcut, which takes the fourth result.

    That is ``x`` itself, or a view of it whose gradient the convolution's own input gradient adds as it is stored, instead of a
    pass that reads two gradients and writes a third.
    """
    arguments, backend = _conv_stats(x, weight, (None,) * 3, False, stride, padding, dilation, groups, True)
    if not (_joins(backend) and x.requires_grad and arguments[0] is x):
        return *overload("conv_stats", backend)(*arguments), x
    y, mean, var, view = JoinedConvStats.apply(*arguments, backend, True, None)
    return y, mean, var, recipes.hand_on(x, view)


def end_conv_stats(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    center: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    relu: bool = False,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Factor | None]:
    """:func:`conv_stats` whose result goes to one reader, the end of a block. With the factor, if there is one, that reader may
    send back dz for scale·dz: see ``factors`` in :func:`scale_shift_act`."""
    arguments, backend = _conv_stats(x, weight, (scale, center, shift), relu, stride, padding, dilation, groups, True)
    if not _joins(backend):
        return *overload("conv_stats", backend)(*arguments), None
    factor = Factor()
    y, mean, var, _ = JoinedConvStats.apply(*arguments, backend, False, factor)
    return y, mean, var, factor


Factors = tuple[Factor | None, Factor | None]


def _joined_point(op: str, backend: str, arguments: tuple[Any, ...], relu: bool, factors: Factors) -> Tensor | None:
    """The op as a node that sends back dz, if its ``y`` comes from a convolution that applies the factor."""
    of_y, of_residual = factors
    if of_y is None or not relu or backend not in MASKED[op] or not _joins(backend):
        return None
    _, scale, _, _, _, res_scale, *_ = arguments
    if res_scale is None:
        of_residual = None
    out = JoinedPoint.apply(*arguments, relu, op, backend, of_y, of_residual)
    of_y.vector = scale.detach()
    if of_residual is not None:
        of_residual.vector = res_scale.detach()
    return out


def scale_shift_act(
    y: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    res_scale: Tensor | None = None,
    res_center: Tensor | None = None,
    res_shift: Tensor | None = None,
    *,
    relu: bool = True,
    factors: Factors = (None, None),
) -> Tensor:
    """``act(scale·(y − center) + shift + r)``: the end of a residual block.

    Args:
        y: [N, C, H, W]. scale, center, shift: [C].
        residual: [N, C, H, W] or None; r is the residual itself, or ``res_scale·(residual − res_center) + res_shift``
            when its own coefficients ([C] each) are given, as for a projection shortcut.
        factors: what :func:`end_conv_stats` gave with ``y`` and with the residual. Nothing else may read such a tensor: its
            gradient is right only together with its factor.

    Returns:
        [N, C, H, W] in the dtype and memory format of ``y``; computed in float32 or wider and rounded once.

    Raises:
        InputError: wrong shapes, dtypes or devices. BackendError: a requested backend can't serve.
    """
    y, residual = checked_point(
        "scale_shift_act", y, (scale, center, shift), residual, (res_scale, res_center, res_shift)
    )
    backend = backends.select("scale_shift_act", y).backend
    args = (y, scale, center, shift, residual, res_scale, res_center, res_shift)
    joined = _joined_point("scale_shift_act", backend, args, relu, factors)
    if joined is not None:
        return joined
    forward = overload("scale_shift_act", backend)
    out = forward(*args, relu)
    if res_scale is None:
        return out
    # both raw maps are saved anyway: the result is rebuilt rather than saved
    return recipes.attach(backend, out, partial(_rebuild, forward, relu), *(t for t in args if t is not None))


def _rebuild(forward: Callable[..., Tensor], relu: bool, *tensors: Tensor) -> Tensor:
    return forward(*tensors, relu)


def scale_shift_act_mean(
    y: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    res_scale: Tensor | None = None,
    res_center: Tensor | None = None,
    res_shift: Tensor | None = None,
    *,
    relu: bool = True,
    factors: Factors = (None, None),
) -> Tensor:
    """The mean over H and W of :func:`scale_shift_act`: a network's last block and its global average pool.

    Args:
        y: [N, C, H, W], H and W at least 1. The rest as in :func:`scale_shift_act`.

    Returns:
        [N, C] in the dtype of ``y``; accumulated in float32 or wider.

    Raises:
        InputError: wrong shapes, dtypes or devices. BackendError: a requested backend can't serve.
    """
    op, main, other = "scale_shift_act_mean", (scale, center, shift), (res_scale, res_center, res_shift)
    y, residual = checked_point(op, y, main, residual, other)
    if not y.shape[2] or not y.shape[3]:
        raise InputError(f"{op}: the map {list(y.shape)} has no positions to average")
    backend = backends.select(op, y).backend
    joined = _joined_point(op, backend, (y, *main, residual, *other), relu, factors)
    return overload(op, backend)(y, *main, residual, *other, relu) if joined is None else joined


def scale_shift_act_pool(
    y: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    *,
    relu: bool = True,
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
) -> Tensor:
    """Max-pool of ``act(scale·(y − center) + shift)``, whose full-size map is never written: the stem of ImageNet nets.

    Args:
        y: [N, C, H, W]. scale, center, shift: [C]. kernel, stride, padding: of a floor-mode pool, kernel² ≤ 255.

    Returns:
        [N, C, P, Q] in the dtype and memory format of ``y``. Backward keeps 8-bit positions inside the windows.

    Raises:
        InputError: wrong shapes, dtypes or devices, or a window too large. BackendError: a requested backend can't serve.
    """
    (y,) = autocast(y)  # type: ignore[assignment]
    check_map("scale_shift_act_pool input", y)
    check_vectors("scale_shift_act_pool", y, y.shape[1], scale=scale, center=center, shift=shift)
    if not (1 <= kernel <= 15 and stride >= 1 and 0 <= padding <= kernel // 2):
        raise InputError(
            f"scale_shift_act_pool: kernel {kernel} (1…15), stride {stride} (≥ 1), padding {padding} (≤ kernel/2)"
        )
    if min(y.shape[2], y.shape[3]) + 2 * padding < kernel:
        raise InputError(f"scale_shift_act_pool: a {kernel}x{kernel} window does not fit the map {list(y.shape)}")
    backend = backends.select("scale_shift_act_pool", y).backend
    args = (relu, kernel, stride, padding)
    out, index = overload("scale_shift_act_pool", backend)(y, scale, center, shift, *args)
    gather = overload("scale_shift_act_pool", backend, "gather")
    return recipes.attach(backend, out, partial(_regather, gather, args), y, scale, center, shift, index)


def _regather(gather: Callable[..., Tensor], args: tuple[bool, int, int, int], *tensors: Tensor) -> Tensor:
    return gather(*tensors, *args)


def batch_norm_act(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act(bn(y) + residual)`` with the statistics of ``y`` itself: training BatchNorm of a map that fits on chip.

    Args:
        y: [N, C, H, W]. weight, bias: [C], float32 (float64 for float64 maps). residual: [N, C, H, W] or None.

    Returns:
        out [N, C, H, W] in the dtype and memory format of ``y``; mean [C] and biased variance [C] over N·H·W in float32
        (float64 for fp64), constants to autograd.

    Raises:
        InputError: wrong shapes, dtypes or devices. BackendError: a requested backend can't serve, as cuda can't where the
        map doesn't fit on the GPU's multiprocessors.
    """
    op = "batch_norm_act"
    y, residual = autocast(y, residual)  # type: ignore[assignment]
    check_map(f"{op} input", y)
    check_vectors(op, y, y.shape[1], weight=weight, bias=bias)
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    for name, v in (("weight", weight), ("bias", bias)):
        if v.dtype != wide:
            raise InputError(f"{op}: {name} is {v.dtype}, expected {wide} for a map in {y.dtype}")
    check_residual(op, y, residual)
    backend = backends.select(op, y).backend
    return overload(op, backend)(y, weight, bias, residual, eps, relu)


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """``act(conv(x, weight) + bias + residual)``: a layer whose BatchNorm is folded into ``weight`` and ``bias``.

    Args:
        x: [N, C, H, W]. weight: [K, C/groups, R, S]. bias: [K] or None. residual: [N, K, P, Q] or None.

    Returns:
        [N, K, P, Q] in the dtype of ``x``.

    Raises:
        InputError: wrong shapes, dtypes or devices. BackendError: a requested backend can't serve.
    """
    x, weight, residual = autocast(x, weight, residual)  # type: ignore[assignment]
    check_conv("conv_act", x, weight, groups)
    check_vectors("conv_act", x, weight.shape[0], bias=bias)
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    if residual is not None:
        sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        out_size = [(h + 2 * p - d * (r - 1) - 1) // s + 1 for h, r, s, p, d in sizes]
        expected = [x.shape[0], weight.shape[0], *out_size]
        if list(residual.shape) != expected:
            raise InputError(f"conv_act: residual has shape {list(residual.shape)}, but the result has {expected}")
        if residual.device != x.device or residual.dtype != x.dtype:
            raise InputError(
                f"conv_act: residual is {residual.dtype} on {residual.device}, input {x.dtype} on {x.device}"
            )
    conv = backends.Geometry(tuple(weight.shape), stride, padding, dilation, groups)
    backend = backends.select("conv_act", x, conv).backend
    return overload("conv_act", backend)(x, weight, bias, residual, relu, stride, padding, dilation, groups)
