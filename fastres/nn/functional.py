"""One layer of a residual network, conv-BatchNorm(-add)(-ReLU), in its fused and its plain form.

The fused form never writes a normalised map in training: a layer gives its raw convolution output with the
coefficients that normalise it (a :class:`Pending` activation), the next convolution applies them while it reads, and the
end of a block applies them together with the shortcut. In evaluation BatchNorm is folded into the weights.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import backends, ops

from .folding import folded
from .statistics import (
    BatchNorm,
    BatchStatistics,
    check_batch,
    for_running,
    merged,
    update_running,
    uses_batch_statistics,
)


class Pending(NamedTuple):
    """An activation that was not applied yet: ``act(scale·(y − center) + shift)``, y [N, C, H, W], vectors [C]."""

    y: Tensor
    scale: Tensor
    center: Tensor
    shift: Tensor
    relu: bool
    factor: Any = None  # of fastres.ops.end_conv_stats, where y has one reader, the end of a block


Activation = Tensor | Pending
Updates = list[tuple[Tensor, Tensor]]  # what running means and variances are to be updated with, in order


def materialize(x: Activation) -> Tensor:
    """The activation as an ordinary tensor [N, C, H, W]."""
    if isinstance(x, Tensor):
        return x
    return ops.scale_shift_act(x.y, x.scale, x.center, x.shift, relu=x.relu)


def averaged(x: Activation) -> Tensor:
    """The activation's mean over H and W, [N, C]; a pending one is activated on the fly and its map never written."""
    if isinstance(x, Tensor):
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
    return ops.scale_shift_act_mean(x.y, x.scale, x.center, x.shift, relu=x.relu)


def conv_arguments(conv: nn.Conv2d) -> dict[str, object]:
    """Stride, padding, dilation and groups of a convolution the fused ops can express.

    Raises:
        ValueError: non-zero padding modes, or padding="same" where it is not symmetric.
    """
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode={conv.padding_mode!r}: only zero padding can be fused")
    padding = conv.padding
    if isinstance(padding, str):
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if padding == "same" and any(t % 2 for t in totals):
            raise ValueError(f"padding='same' is not symmetric for kernel {conv.kernel_size}, dilation {conv.dilation}")
        padding = tuple(t // 2 for t in totals) if padding == "same" else (0, 0)
    return {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}


def fused_conv_bn_act(
    x: Activation,
    conv: nn.Conv2d,
    bn: BatchNorm,
    relu: bool,
    residual: Activation | None = None,
    updates: Updates | None = None,
    average: bool = False,
    once: bool = False,
) -> Activation:
    """``act(bn(conv(x)) + residual)`` with whatever the modules hold and in the mode ``bn`` is in.

    Args:
        x: tensor or pending activation [N, C, H, W].
        conv, bn: ordinary modules (nn.Conv2d, nn.BatchNorm2d or nn.SyncBatchNorm); ``bn.training`` decides between
            batch and running statistics.
        relu: whether a ReLU follows. residual: tensor or pending activation added before it.
        updates: collects the statistics instead of applying them to the running ones; for code that may run twice.
        average: give the mean over P and Q instead. once: the result is used once, as the residual of a block's end.

    Returns:
        A pending activation in training without residual, else a tensor [N, K, P, Q]; with ``average`` a tensor [N, K].

    Raises:
        InputError: wrong shapes, dtypes or devices. ValueError: one value per channel in training, as PyTorch.
    """
    return _layer(x, conv, bn, relu, residual, updates, average, once=once)[0]


def forked_conv_bn_act(x: Tensor, conv: nn.Conv2d, bn: BatchNorm, relu: bool) -> tuple[Activation, Tensor]:
    """(``act(bn(conv(x)))``, ``x`` for whoever else reads it): the begin of a block, whose shortcut takes the second. It may be
    a view of ``x``; see :func:`fastres.ops.forked_conv_stats`."""
    return _layer(x, conv, bn, relu, fork=True)


def _layer(
    x: Activation, conv: nn.Conv2d, bn: BatchNorm, relu: bool, residual: Activation | None = None,
    updates: Updates | None = None, average: bool = False, fork: bool = False, once: bool = False,
) -> tuple[Activation, Any]:  # fmt: skip
    """(the layer's result, with ``fork`` its input)."""
    backends.entering(conv)
    args = conv_arguments(conv)
    if not uses_batch_statistics(bn):
        weight, bias = folded(conv, bn)
        rest = None if residual is None else materialize(residual)
        out = ops.conv_act(materialize(x), weight, bias, rest, relu=relu, **args)  # type: ignore[arg-type]
        return (averaged(out) if average else out), x
    factor = None
    if fork:
        y, mean, var, x = ops.forked_conv_stats(x, conv.weight, **args)  # type: ignore[arg-type]
    elif once or residual is not None:
        source, given = (x.y, x[1:4]) if isinstance(x, Pending) else (x, ())
        args["relu"] = isinstance(x, Pending) and x.relu
        y, mean, var, factor = ops.end_conv_stats(source, conv.weight, *given, **args)  # type: ignore[arg-type]
    elif isinstance(x, Tensor):
        y, mean, var = ops.conv_stats(x, conv.weight, **args)  # type: ignore[arg-type]
    else:
        vectors = (x.scale, x.center, x.shift)
        y, mean, var = ops.conv_stats(x.y, conv.weight, *vectors, relu=x.relu, **args)  # type: ignore[arg-type]
    check_batch(y, bn)
    stats = merged(BatchStatistics(mean, var, y.numel() // y.shape[1]), bn)
    scale, center, shift = ops.bn_coefficients(stats.mean, stats.var, bn.weight, bn.bias, bn.eps)
    if conv.bias is not None:
        # A bias cancels in the normalised map (its gradient is zero), but the running mean contains it.
        shift = shift + 0.0 * conv.bias
        stats = stats._replace(mean=stats.mean + conv.bias)
    if updates is not None:
        updates.append(for_running(stats))
    elif y.numel():
        update_running(bn, *for_running(stats))
    if residual is None:
        pending = Pending(y, scale, center, shift, relu, factor)
        return (averaged(pending) if average else pending), x
    backends.entering(bn)
    if isinstance(residual, Pending) and residual.relu:
        residual = materialize(residual)
    end = ops.scale_shift_act_mean if average else ops.scale_shift_act
    if isinstance(residual, Tensor):
        return end(y, scale, center, shift, residual, relu=relu, factors=(factor, None)), x
    return end(y, scale, center, shift, *residual[:4], relu=relu, factors=(factor, residual.factor)), x


def plain_conv_bn_act(
    x: Activation,
    conv: nn.Conv2d,
    bn: BatchNorm,
    relu: bool,
    residual: Activation | None = None,
    updates: Updates | None = None,
) -> Tensor:
    """The same layer by ordinary PyTorch modules, as torchvision computes it: the reference."""
    assert isinstance(x, Tensor)
    out = bn(conv(x))
    if residual is not None:
        assert isinstance(residual, Tensor)
        out += residual
    return F.relu(out, inplace=True) if relu else out


def fused_pool(x: Activation, pool: nn.MaxPool2d) -> Tensor:
    """Max-pool of an activation; a pending one is activated on the fly and its full-size map never written."""
    backends.entering(pool)
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    if isinstance(x, Tensor):
        return pool(x)
    if not all(isinstance(v, int) for v in (kernel, stride, padding)) or pool.dilation != 1 or pool.ceil_mode:
        return pool(materialize(x))
    args = {"kernel": kernel, "stride": stride, "padding": padding}
    return ops.scale_shift_act_pool(x.y, x.scale, x.center, x.shift, relu=x.relu, **args)  # type: ignore[arg-type]


def channels_last(x: Tensor) -> Tensor:
    """``x`` in channels_last, the one layout fused networks run in; no copy when it is already."""
    return x.contiguous(memory_format=torch.channels_last)
