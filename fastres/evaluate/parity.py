"""Whether fused kernels agree with plain PyTorch here: for every op on every backend, and for whole networks.

The rule: with the error measured against float64 as ``|x - truth| / |truth|`` (2-norms), a candidate passes if its
error is at most twice that of plain PyTorch in the same dtype, plus a floor for cases in which that one happens to be
exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastres
from fastres import backends
from fastres.ops.schemas import OPS

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}
FACTOR = 2.0
# The rows of the matrix. "tf32" is float32 whose products may be TF32, on a GPU. The library may not use that for a shape: then
# its error says little, and the floor is what cutting operands to 10 bits of mantissa costs.
TF32, TF32_FLOOR = "tf32", 4e-3
DTYPES = {"float32": torch.float32, TF32: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS_OF = {"cpu": ("float32", "bfloat16"), "cuda": tuple(DTYPES)}


@dataclass(frozen=True)
class Parity:
    """``error`` and ``allowed`` are relative; ``reason`` says why nothing was compared, ``raised`` what went wrong."""

    what: str
    backend: str
    device: str
    dtype: str
    error: float = math.nan
    allowed: float = math.nan
    reason: str | None = None
    raised: str | None = None

    @property
    def failed(self) -> bool:
        return self.reason is None and not self.error <= self.allowed


def relative_error(candidate: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error over pairs of tensors; infinite where shapes differ or a candidate is not finite."""
    worst = 0.0
    for mine, exact in zip(candidate, truth, strict=True):
        if mine.shape != exact.shape or not bool(mine.isfinite().all()):
            return math.inf
        exact = exact.double()
        difference, size = float((mine.double() - exact).norm()), float(exact.norm())
        worst = max(worst, difference / size if size else difference)
    return worst


Case = tuple[Callable[..., Any], list[Tensor]]


def _cases() -> Iterator[tuple[str, Case]]:
    """Small problems in float64 with odd sizes; BatchNorm weights of both signs, means far from zero."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def image(*shape: int) -> Tensor:
        return normal(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def coefficients(channels: int) -> list[Tensor]:
        return [normal(channels), 3 * normal(channels), normal(channels)]

    x, weight = image(2, 20, 9, 13), normal(24, 20, 3, 3) / 12
    yield "conv_stats", (partial(fastres.conv_stats, relu=True, padding=1), [x, weight, *coefficients(20)])
    yield "conv_stats", (partial(fastres.conv_stats, stride=2), [x, normal(24, 20, 1, 1) / 4])
    stem = normal(2, 3, 15, 17)  # contiguous
    yield "conv_stats", (partial(fastres.conv_stats, stride=2, padding=3), [stem, normal(24, 3, 7, 7) / 12])
    wide = image(2, 72, 12, 11)  # several tiles both ways
    product = [wide, normal(136, 72, 1, 1) / 8, *coefficients(72)]
    yield "conv_stats", (fastres.conv_stats, product)
    grouped = [x, normal(24, 5, 3, 3) / 6, *coefficients(20)]
    yield "conv_stats", (partial(fastres.conv_stats, padding=2, dilation=2, groups=4), grouped)
    y, other = image(3, 33, 7, 5), image(3, 33, 7, 5)
    yield "scale_shift_act", (partial(fastres.scale_shift_act, relu=True), [y, *coefficients(33)])
    yield "scale_shift_act", (partial(fastres.scale_shift_act, relu=True), [y, *coefficients(33), other])
    every = [y, *coefficients(33), other, *coefficients(33)]
    yield "scale_shift_act", (partial(fastres.scale_shift_act, relu=True), every)
    yield "scale_shift_act", (partial(fastres.scale_shift_act, relu=False), every)
    yield "scale_shift_act_mean", (partial(fastres.scale_shift_act_mean, relu=True), [y, *coefficients(33), other])
    yield "scale_shift_act_mean", (partial(fastres.scale_shift_act_mean, relu=True), every)
    yield "scale_shift_act_pool", (fastres.scale_shift_act_pool, _distinct(generator))
    yield "batch_norm_act", (fastres.batch_norm_act, [y, normal(33), normal(33), other])
    # Small whole numbers, and biases halfway between them: no pre-activation is near the ReLU's edge, where rounding
    # could decide which gradients pass.
    whole = [
        torch.randint(-2, 3, shape, generator=generator).double() for shape in (x.shape, weight.shape, (2, 24, 5, 7))
    ]
    arguments = [whole[0].contiguous(memory_format=torch.channels_last), whole[1], normal(24).round() + 0.5, whole[2]]
    yield "conv_act", (partial(fastres.conv_act, stride=2, padding=1), arguments)


def _distinct(generator: torch.Generator) -> list[Tensor]:
    """A map and coefficients in small whole numbers, all different within a channel: no dtype rounds them, so that
    there are no ties between which two correct poolings could choose differently."""
    n, channels, height, width = 2, 17, 11, 9
    places = torch.rand(n, height * width, channels, generator=generator).argsort(1).double() - height * width // 2
    y = places.view(n, height, width, channels).permute(0, 3, 1, 2)
    signs = torch.randint(0, 2, (channels,), generator=generator).double() * 2 - 1
    center, shift = torch.randint(-9, 10, (2, channels), generator=generator).double()
    return [y, signs, center, shift]


def _outcome(case: Case, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """Results and gradients of a case, as the backend gives them."""
    function, arguments = case
    inputs = []
    for value in arguments:
        # Per-channel vectors stay in float32 when the maps are narrower. All dtypes start from the same rounded
        # numbers, so that rounding the inputs is nobody's error.
        narrow = torch.float64 if dtype == torch.float64 else (dtype if value.dim() == 4 else torch.float32)
        inputs.append(value.to(device, narrow).detach().requires_grad_())
    with backends.use_backend(backend):
        found = function(*inputs)
        results = [found] if isinstance(found, Tensor) else list(found)
        generator = torch.Generator().manual_seed(2)
        total = sum(
            (r.double() * torch.randn(r.shape, generator=generator, dtype=torch.float64).to(device)).sum()
            for r in results
        )
        total.backward()  # type: ignore[union-attr]
    return [t.detach() for t in results] + [i.grad for i in inputs if i.grad is not None]


def _rounded(case: Case, dtype: torch.dtype) -> Case:
    function, arguments = case
    narrow = [value.to(dtype if value.dim() == 4 else torch.float32).double() for value in arguments]
    return function, narrow


def op_parity(device: str, names: Sequence[str] | None = None, dtypes: Sequence[str] | None = None) -> list[Parity]:
    """The parity matrix of ``device``: every op on every backend in every dtype, forward and backward.

    Args:
        device: "cpu" or "cuda", or one of several ("cuda:1"). names: backends (all that an op has). dtypes: of :data:`DTYPES`
            (what the kind of device offers).

    Returns:
        One row an op, backend and dtype: the worst of its cases, or why there is none.
    """
    grouped: dict[str, list[Case]] = {}
    for op, case in _cases():
        grouped.setdefault(op, []).append(case)
    kind = torch.device(device).type
    rows = []
    for op, cases in grouped.items():
        for backend in OPS[op].backends if names is None else [b for b in OPS[op].backends if b in names]:
            for name in ROWS_OF[kind] if dtypes is None else dtypes:
                refused = backends.refusal(backend, op, kind, DTYPES[name])
                row = partial(Parity, op, backend, device, name)
                rows.append(
                    row(reason=refused) if refused is not None else _measured(row, cases, name, device, backend)
                )
    return rows


def _measured(row: Callable[..., Parity], cases: list[Case], name: str, device: str, backend: str) -> Parity:
    """The worst case. A backend that raises has failed, and the others still have their turn."""
    try:
        with _products(name):
            return row(*_worst([_compare(_rounded(c, DTYPES[name]), name, device, backend) for c in cases]))
    except Exception as error:
        return row(error=math.inf, allowed=0.0, raised=" ".join(str(error).split())[:200] or type(error).__name__)


@contextmanager
def _products(name: str) -> Iterator[None]:
    """Products of float32 as the row of the matrix has them."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32" if name == TF32 else "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _compare(case: Case, name: str, device: str, backend: str) -> tuple[float, float]:
    dtype, floor = DTYPES[name], TF32_FLOOR if name == TF32 else FLOOR[DTYPES[name]]
    truth = _outcome(case, torch.float64, "cpu", "reference")
    plain = _outcome(case, dtype, device, "reference")
    mine = _outcome(case, dtype, device, backend)
    limits = []
    for candidate, baseline, exact in zip(mine, plain, truth, strict=True):
        allowed = FACTOR * relative_error([baseline.cpu()], [exact]) + floor
        limits.append((relative_error([candidate.cpu()], [exact]), allowed))
    return _worst(limits)


def _worst(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The pair that is closest to, or farthest beyond, what it is allowed."""
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def network_parity(
    fused: nn.Module, plain: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype, step: bool
) -> Parity:
    """Compare two networks with the same weights: logits in evaluation mode, or loss and gradients of a training step.

    Leaves parameters, statistics and modes as they were.
    """
    import copy

    def outcome(model: nn.Module, kind: torch.dtype) -> list[Tensor]:
        model = copy.deepcopy(model).train(step)
        model = model.double() if kind == torch.float64 else model
        inputs = images.double() if kind == torch.float64 else images
        with torch.autocast(images.device.type, kind, enabled=kind in (torch.bfloat16, torch.float16)):
            logits = model(inputs)
        if not step:
            return [logits.detach()]
        loss = F.cross_entropy(logits if kind == torch.float64 else logits.float(), labels)
        loss.backward()
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return [loss.detach(), torch.cat(gradients)]

    with torch.set_grad_enabled(step):
        truth = outcome(plain, torch.float64)
        baseline, mine = outcome(plain, dtype), outcome(fused, dtype)
    pairs = [
        # A whole network accumulates rounding over its depth, hence the larger floor.
        (relative_error([m], [t]), FACTOR * relative_error([b], [t]) + 10 * FLOOR[dtype])
        for m, b, t in zip(mine, baseline, truth, strict=True)
    ]
    what = "loss and gradients of a step" if step else "logits"
    return Parity(what, "fused", images.device.type, str(dtype).removeprefix("torch."), *_worst(pairs))
