"""Each op on each of its backends against the composition of ATen operations that does the same work.

``bn_coefficients`` is [C] vectors in plain PyTorch, without a backend: it is timed inside the blocks.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks import cotangent, outcome, require
from benchmarks.conftest import Bench
from fastres import backends, ops
from fastres.ops.schemas import OPS

ATEN = "ATen composition, channels_last"


def affine(y: Tensor, scale: Tensor, center: Tensor, shift: Tensor) -> Tensor:
    """``scale·(y − center) + shift`` in ATen's one pass over the map: BatchNorm in evaluation with variance 1, eps 0.

    ``center`` is a constant to autograd, here as in our ops.
    """
    center = center.detach()
    return F.batch_norm(y, center, torch.ones_like(center), scale, shift, False, 0.0, 0.0)


def aten_end(y: Tensor, a: Tensor, b: Tensor, c: Tensor, r: Tensor, *projection: Tensor) -> Tensor:
    return affine(y, a, b, c).add_(affine(r, *projection) if projection else r).relu_()


def aten_pool(y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return F.max_pool2d(affine(y, a, b, c).relu_(), 3, 2, 1)


def aten_conv_stats(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """The statistics by the pass that BatchNorm itself uses; it has no derivative."""
    y = aten_conv(x, w, a, b, c)
    mean, var = torch.batch_norm_update_stats(y, None, None, 0.0)
    return y, mean.to(a.dtype), var.to(a.dtype)


def aten_conv(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return F.conv2d(affine(x, a, b, c).relu_(), w, padding=1)


def our_conv(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return ops.conv_stats(x, w, a, b, c, relu=True, padding=1, stats=False)[0]


def aten_norm(y: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.batch_norm(y, None, None, w, b, True).add_(r).relu_()


def our_norm(y: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return ops.batch_norm_act(y, w, b, r)[0]


def aten_conv_act(x: Tensor, w: Tensor, bias: Tensor, r: Tensor) -> Tensor:
    return F.conv2d(x, w, bias.to(x.dtype), padding=1).add_(r).relu_()


Inputs = Callable[[int, int, int], list[Tensor]]


def image(n: int, c: int, side: int) -> Tensor:
    return torch.randn(n, c, side, side).contiguous(memory_format=torch.channels_last)


def vectors(c: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(c) for _ in range(count)]


def weight(c: int) -> Tensor:
    return (torch.randn(c, c, 3, 3) / (9 * c) ** 0.5).contiguous(memory_format=torch.channels_last)


# name: (op, ours, ATen's, inputs for (N, C, side), full size, with a backward pass)
CASES: dict[str, tuple[str, Callable, Callable, Inputs, tuple[int, int, int], bool]] = {
    "scale_shift_act-identity": (
        "scale_shift_act", ops.scale_shift_act, aten_end,
        lambda n, c, s: [image(n, c, s), *vectors(c), image(n, c, s)], (16, 256, 56), True,
    ),
    "scale_shift_act-projection": (
        "scale_shift_act", ops.scale_shift_act, aten_end,
        lambda n, c, s: [image(n, c, s), *vectors(c), image(n, c, s), *vectors(c)], (16, 256, 56), True,
    ),
    "scale_shift_act_mean": (
        "scale_shift_act_mean", ops.scale_shift_act_mean, lambda *inputs: aten_end(*inputs).mean((2, 3)),
        lambda n, c, s: [image(n, c, s), *vectors(c), image(n, c, s)], (16, 2048, 7), True,
    ),
    "scale_shift_act_pool": (
        "scale_shift_act_pool", ops.scale_shift_act_pool, aten_pool,
        lambda n, c, s: [image(n, c, s), *vectors(c)], (16, 64, 112), True,
    ),
    "batch_norm_act": (
        "batch_norm_act", our_norm, aten_norm,
        lambda n, c, s: [image(n, c, s), *vectors(c, 2), image(n, c, s)], (16, 2048, 7), True,
    ),
    "conv_stats-statistics": (
        "conv_stats", partial(ops.conv_stats, relu=True, padding=1), aten_conv_stats,
        lambda n, c, s: [image(n, c, s), weight(c), *vectors(c)], (16, 64, 56), False,
    ),
    "conv_stats-prologue": (
        "conv_stats", our_conv, aten_conv,
        lambda n, c, s: [image(n, c, s), weight(c), *vectors(c)], (16, 64, 56), True,
    ),
    "conv_act": (
        "conv_act", partial(ops.conv_act, padding=1), aten_conv_act,
        lambda n, c, s: [image(n, c, s), weight(c), *vectors(c, 1), image(n, c, s)], (16, 64, 56), False,
    ),
}  # fmt: skip
PARAMETERS = [
    pytest.param(name, backend, mode, id=f"{name}-{backend}-{mode}")
    for name, (op, *_, differentiable) in CASES.items()
    for backend in OPS[op].backends
    if backend not in ("triton", "cuda")
    for mode in (("forward", "backward") if differentiable else ("forward",))
]


@pytest.mark.parametrize(("name", "backend", "mode"), PARAMETERS)
def test_op(bench: Bench, dtype: torch.dtype, name: str, backend: str, mode: str) -> None:
    op, ours, aten, make, (n, c, side), _ = CASES[name]
    reason = backends.refusal(backend, op, "cpu", dtype)
    if reason is not None:
        pytest.skip(reason)
    n = bench.size(4, n)
    # Every contender gets the same rounded numbers; vectors stay in float32.
    inputs = [t.to(dtype) if t.dim() == 4 else t for t in make(n, c, side)]
    small = [t[:1] if t.dim() == 4 and t.shape[0] == n and t.shape[2] == side else t for t in inputs]
    narrow = "bf16" if dtype is torch.bfloat16 else "fp32"
    case = f"{name}-{backend}-{narrow}-{mode}"

    def on_backend(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with backends.use_backend(backend):
            return ours(*tensors)

    require(
        outcome(on_backend, small, mode == "backward"),
        outcome(aten, small, mode == "backward"),
        outcome(aten, [t.double() for t in small], mode == "backward"),
        case,
    )
    make_call = backward_call if mode == "backward" else forward_call
    shape = f"{n}x{c}x{side}x{side}"
    bench.compare("ops", case, shape, make_call(on_backend, inputs), {ATEN: make_call(aten, inputs)})


def forward_call(function: Callable, inputs: list[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


def backward_call(function: Callable, inputs: list[Tensor]) -> Callable[[], object]:
    """The backward pass alone, on a graph that is kept."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    gradient = cotangent(out)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True, allow_unused=True)
