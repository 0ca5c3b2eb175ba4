"""Levels of fusion: what the same training step moves when more and more of it happens inside the convolutions.

L1 to L4 are models, written down for the operations of a fused network; "fastres" is what this package's kernels move,
by the formulas of ``kernels/<op>/bytes.py``. All of them count every tensor once for each kernel that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from fastres.kernels.common.traffic import Pass, named, size
from fastres.kernels.conv_stats import bytes as conv_stats

from . import eager

MASK_BITS = 1  # for each element, beside which a 16-bit map has 16


@dataclass(frozen=True)
class Level:
    """What is fused. ``key`` is its short name; the flags hold for the models L1 to L4."""

    key: str
    text: str
    statistics: bool = False  # sums of BatchNorm's forward in the convolution's epilogue
    prologue: bool = False  # BatchNorm and ReLU in the next convolution's prologue, the backward sums in its epilogue
    accumulate: bool = False  # gradients that meet are added in an input gradient's epilogue
    statistics_gradient: bool = False  # BatchNorm's backward in the prologue of both gradients


LEVELS = (
    Level("L0", "eager channels_last: convolution, BatchNorm, ReLU and addition are kernels of their own"),
    Level("L1", "torch.compile: BatchNorm + addition + ReLU are one kernel, masks of 1 bit"),
    Level("L2", "statistics in the convolution's epilogue", statistics=True),
    Level(
        "L3", "activation in the prologue, BatchNorm's sums and gradient sums in the epilogue",
        statistics=True, prologue=True, accumulate=True,
    ),
    Level(
        "L4", "BatchNorm's backward in the prologue of both gradients, the block's masked gradient never written",
        statistics=True, prologue=True, accumulate=True, statistics_gradient=True,
    ),
    Level("fastres", "the kernels of this package, composed by autograd"),
)  # fmt: skip
MODELS = LEVELS[1:5]


def _mask(t: Tensor) -> float:
    return t.numel() * MASK_BITS / 8


class Model:
    """Passes of one level, for the calls of a fused network's step."""

    def __init__(self, level: Level) -> None:
        self.level = level

    def passes(self, name: str, suffix: str, arguments: Sequence[Any], result: Any, in_backward: bool) -> list[Pass]:
        """``name``, ``suffix``: of an op of fastres ("backward" or ""), or of an ATen operation ("")."""
        formula: Callable[..., list[Pass]] | None = getattr(self, f"{name}_{suffix}" if suffix else name, None)
        if in_backward and name.startswith("scale_shift_act") and suffix not in ("backward", "masked"):
            return []  # rebuilds an activation that these levels keep
        return formula(*arguments) if formula is not None else eager.of(name, arguments, result)

    def conv_stats(self, x: Tensor, weight: Tensor, scale: Any, *rest: Any) -> list[Pass]:
        (conv,) = conv_stats.forward(x, weight, scale, *rest)
        passes = [conv]
        if scale is not None and not self.level.prologue:
            passes.insert(0, Pass("normalise + ReLU", named(x=x), named(a=x, mask=_mask(x))))
        if not self.level.statistics:
            passes.append(Pass("statistics", dict(conv.writes)))
        return passes

    def conv_stats_backward(
        self, grad_y: Tensor, grad_mean: Any, grad_var: Any, x: Tensor, weight: Tensor, y: Tensor, mean: Any, scale: Any,
        center: Any, shift: Any,
        relu: bool, stride: Any, padding: Any, dilation: Any, groups: int,
        need_input: bool, need_weight: bool, addend: Any = None, factor: Any = None,
    ) -> list[Pass]:  # fmt: skip
        vectors, geometry = (scale, center, shift), (stride, padding, dilation, groups, need_input, need_weight)
        passes = [] if addend is None else self.add(addend, addend)
        if not self.level.statistics_gradient:
            passes.append(Pass("BatchNorm backward", named(grad=grad_y, y=y), named(grad_y=y)))
            grad_var = None  # what the convolutions read is complete
        if not self.level.prologue:
            vectors = (None, None, None)
            if scale is not None:  # the mask is read by the sums and by BatchNorm's backward of the layer before
                passes.append(Pass("sums", {**named(grad=x, x=x), "mask": 2 * _mask(x)}))
        return passes + conv_stats.backward(grad_y, grad_mean, grad_var, x, weight, y, mean, *vectors, relu, *geometry)

    def scale_shift_act(self, y: Tensor, scale: Any, center: Any, shift: Any, residual: Any, *rest: Any) -> list[Pass]:
        return [Pass("normalise + add + ReLU", named(y=y, residual=residual), named(out=y, mask=_mask(y)))]

    def scale_shift_act_backward(
        self, grad: Tensor, y: Tensor, scale: Any, center: Any, shift: Any, residual: Any, res_scale: Any, *rest: Any
    ) -> list[Pass]:
        both = residual if res_scale is not None else None  # a projection's sums as well
        reads = {**named(grad=grad, y=y, residual=both), "mask": _mask(y)}
        if not self.level.statistics_gradient:
            return [Pass("masked gradient + sums", reads, named(dz=y))]
        # Whoever needs the masked gradient reads grad and the mask: both gradients of the convolutions, and the sum of a fork.
        readers = 2 * (1 if both is None else 2) + (1 if residual is not None and both is None else 0)
        return [Pass("sums", reads), Pass("mask of the consumers", {"mask": readers * _mask(y)})]

    scale_shift_act_masked = scale_shift_act_backward

    def scale_shift_act_mean(self, y: Tensor, *rest: Any) -> list[Pass]:
        """At these levels the last block's end and the pool behind it are kernels of their own."""
        return [*self.scale_shift_act(y, *rest), Pass("mean", {"out": float(size(y))})]

    def scale_shift_act_mean_backward(self, grad: Tensor, y: Tensor, *rest: Any) -> list[Pass]:
        return [Pass("spread", {}, {"grad": float(size(y))}), *self.scale_shift_act_backward(y, y, *rest)]

    def scale_shift_act_pool(self, y: Tensor, scale: Any, center: Any, shift: Any, *rest: Any) -> list[Pass]:
        pool = import_module("fastres.kernels.scale_shift_act_pool.bytes").forward(y, scale, center, shift, *rest)
        if self.level.prologue:
            return pool
        return [Pass("normalise + ReLU", named(y=y), named(a=y, mask=_mask(y))), *pool]

    def scale_shift_act_pool_backward(self, grad: Tensor, index: Tensor, y: Tensor, *rest: Any) -> list[Pass]:
        if self.level.prologue:
            return [Pass("pool backward + sums", named(grad=grad, index=index, y=y), named(grad_y=y))]
        sums = {**named(grad=y, y=y), "mask": 2 * _mask(y)}
        return [Pass("pool backward", named(grad=grad, index=index), named(grad_a=y)), Pass("sums", sums)]

    def add(self, a: Tensor, b: Tensor, *rest: Any) -> list[Pass]:
        """Two gradients of one map meet."""
        if a.dim() != 4 or not self.level.accumulate:
            return eager.of("add", (a, b), a) if a.dim() == 4 else []
        return [Pass("addend of an input gradient", named(addend=a))]


class Fastres:
    """Passes of this package's own kernels, and ATen's between them."""

    def passes(self, name: str, suffix: str, arguments: Sequence[Any], result: Any, in_backward: bool) -> list[Pass]:
        if result_of := _formula(name, suffix):
            return result_of(*arguments)
        return eager.of(name, arguments, result)


def _formula(op: str, suffix: str) -> Callable[..., list[Pass]] | None:
    from fastres.ops.schemas import OPS

    if op not in OPS:
        return None
    return getattr(import_module(f"fastres.kernels.{op}.bytes"), suffix or "forward", None)
