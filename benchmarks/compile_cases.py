"""What the compile ledger compiles: every Triton kernel with every configuration, on problems of ResNet-50 at batch 256.

The launches are those of the ops' own host code, run on tensors without memory. Problems that differ in nothing that a
kernel is compiled for (constants, alignment, divisibility) are one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # emulation/compiling.py

from fastres.kernels.common.triton_choice import offered
from fastres.kernels.common.triton_conv import ConvProblem
from fastres.kernels.common.triton_launch import Launch, executing_with

BATCH = 256
# name: C, H = W, K, R = S, stride, padding, prologue. The stem and the problems with a prologue and stride 1 are compiled
# in every configuration: they have the most constants alive, what others need is less of the same.
CONVS = {
    "stem 7x7": (3, 224, 64, 7, 2, 3, False),
    "1x1": (256, 56, 64, 1, 1, 0, False),
    "1x1 prologue": (64, 56, 256, 1, 1, 0, True),
    "1x1 stride 2": (256, 56, 512, 1, 2, 0, False),
    "3x3 prologue": (128, 28, 128, 3, 1, 1, True),
    "3x3 stride 2 prologue": (128, 56, 128, 3, 2, 1, True),
}
SPACES = ("stem 7x7", "1x1 prologue", "3x3 prologue")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One kernel to compile: its launch, what it is called, whether its configuration is the one that runs untuned."""

    kernel: str
    problem: str
    config: str
    launch: Launch
    default: bool
    products: bool  # 16-bit products: tensor cores are a must

    @property
    def sixteen_bit(self) -> bool:
        return "fp32" not in self.problem

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.kernel, self.problem, self.config) if part)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    format_ = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format_)


def captured(call: Callable[[], Any]) -> list[Launch]:
    """The launches that ``call`` would run."""
    launches: list[Launch] = []
    with executing_with(launches.append):
        call()
    return launches


def cases(arch: int, defaults: bool = False) -> Iterator[Case]:
    """Every case for one architecture: bf16 and, where nothing is tuned, fp32; fp16 is bf16 with another letter in its
    instructions. ``defaults``: only the configurations that run where nothing was tuned."""
    seen: set[str] = set()
    for dtype in ("bf16", "fp32"):
        for case in (*_convolutions(dtype, arch), *_pointwise(dtype)):
            space = dtype == "bf16" and (not case.products or case.problem.startswith(SPACES)) and not defaults
            if case.name not in seen and (case.default or space):
                seen.add(case.name)
                yield case


def _each(problem: str, sixteen: bool, arch: int, configs: Any, run: Callable[[Any], Any]) -> Iterator[Case]:
    """The launches of every configuration: that of the main kernel, and once those of its helpers."""
    for number, config in enumerate(configs):
        main, *helpers = captured(lambda config=config: run(config))  # type: ignore[misc]
        untuned = offered(main.name, configs, divmod(arch, 10), sixteen)[0]
        yield Case(main.name, problem, str(config), main, config == untuned, sixteen)
        for helper in helpers:
            yield Case(helper.name, "", _small(helper), helper, number == 0, False)


def _small(launch: Launch) -> str:
    return ",".join(f"{k}={int(v) if isinstance(v, int) else v}" for k, v in sorted(launch.constants.items()))


def _convolutions(dtype: str, arch: int) -> Iterator[Case]:
    from fastres.kernels.conv import triton_run
    from fastres.kernels.conv_stats import triton_input_gradient, triton_weight_gradient
    from fastres.kernels.conv_stats.triton_gradient_tiles import Gradients, Prologue

    kind = DTYPES[dtype]
    for name, (c, side, k, r, stride, padding, prologue) in CONVS.items():
        x, weight = meta(BATCH, c, side, side, dtype=kind), meta(k, c, r, r, dtype=kind)
        vectors = tuple(meta(c, dtype=torch.float32) if prologue else None for _ in range(3))
        geometry = ((stride, stride), (padding, padding), (1, 1))
        problem = ConvProblem.of(x, weight, *geometry, vectors[0], prologue, True)
        y = meta(*problem.y_shape, dtype=kind)
        label, sixteen = f"{name} {dtype}", problem.sixteen_bit
        configs = triton_run.configurations(problem, divmod(arch, 10))
        yield from _each(
            label,
            sixteen,
            arch,
            configs,
            lambda config: triton_run.convolution(problem, x, weight, vectors, config=config),  # noqa: B023
        )
        one = meta(k, dtype=torch.float32)
        # as in a bottleneck: its first convolution adds the shortcut's gradient, its last one scales what the block's end sends
        addend = None if prologue or r > 1 else x
        factor = one if name == "1x1 prologue" else None
        gradients, before = Gradients.of(y, one, one, y, one, factor), Prologue.of(x, *vectors)
        if c > 3:  # images have no gradient
            yield from _each(
                label, sixteen, arch, triton_input_gradient.configurations(problem),
                lambda config: triton_input_gradient.input_gradient(problem, gradients, weight, before, config, addend),  # noqa: B023
            )  # fmt: skip
        yield from _each(
            label, sixteen, arch, triton_weight_gradient.configurations(problem),
            lambda config: triton_weight_gradient.weight_gradient(problem, gradients, before, weight, config),  # noqa: B023
        )  # fmt: skip


def _pointwise(dtype: str) -> Iterator[Case]:
    from fastres.kernels.scale_shift_act import triton_backend
    from fastres.kernels.scale_shift_act import triton_kernel as point

    y = meta(BATCH, 256, 56, 56, dtype=DTYPES[dtype])
    main = triton_backend.vectors(*(meta(256, dtype=torch.float32) for _ in range(3)))
    for residual, name in ((0, "no residual"), (1, "residual"), (2, "residual with coefficients")):
        rest, other = (y if residual else None), (main if residual == 2 else (None, None, None))
        problem = point.PointProblem.of(y, rest, other[0], True, keep=residual > 0)
        for number, config in enumerate(point.FORWARD_CONFIGS):
            launch = point.forward_launch(problem, config, y, main, rest, other, y)
            yield Case("scale_shift_act forward", f"{name} {dtype}", str(config), launch, number == 0, False)
        for number, config in enumerate(point.BACKWARD_CONFIGS):
            launch, _ = point.backward_launch(problem, config, y, y, main, rest, other, y, rest)
            yield Case("scale_shift_act backward", f"{name} {dtype}", str(config), launch, number == 0, False)
    yield from _last(dtype, main)
    yield from _stem(dtype)


def _last(dtype: str, main: Any) -> Iterator[Case]:
    """The end of the last block, fused with the average over each image."""
    from fastres.kernels.scale_shift_act import triton_kernel as point
    from fastres.kernels.scale_shift_act_mean import triton_kernel as last

    y, means = meta(BATCH, 256, 7, 7, dtype=DTYPES[dtype]), meta(BATCH, 256, dtype=DTYPES[dtype])
    problem = point.PointProblem.of(y, y, None, True, mean=True, keep=True)
    for number, config in enumerate(last.FORWARD_CONFIGS):
        launch = last.forward_launch(problem, config, y, main, y, (None, None, None), means)
        yield Case("scale_shift_act_mean forward", dtype, str(config), launch, number == 0, False)
    for number, config in enumerate(point.BACKWARD_CONFIGS):
        launch, _ = point.backward_launch(problem, config, means, y, main, y, (None, None, None), y, y)
        yield Case("scale_shift_act_mean backward", dtype, str(config), launch, number == 0, False)


def _stem(dtype: str) -> Iterator[Case]:
    from fastres.kernels.conv_stats import triton_stats
    from fastres.kernels.scale_shift_act import triton_backend
    from fastres.kernels.scale_shift_act_pool import triton_kernel as pool

    y, out = meta(BATCH, 64, 112, 112, dtype=DTYPES[dtype]), meta(BATCH, 64, 56, 56, dtype=DTYPES[dtype])
    index = meta(BATCH, 64, 56, 56, dtype=torch.uint8)
    main = triton_backend.vectors(*(meta(64, dtype=torch.float32) for _ in range(3)))
    problem = pool.PoolProblem.of(y, True, 3, 2, 1)
    for number, config in enumerate(pool.FORWARD_CONFIGS):
        launch = pool.forward_launch(problem, config, y, main, out, index)
        yield Case("scale_shift_act_pool forward", dtype, str(config), launch, number == 0, False)
        launch = pool.gather_launch(problem, config, y, main, index, out)
        yield Case("scale_shift_act_pool gather", dtype, str(config), launch, number == 0, False)
    for number, config in enumerate(pool.BACKWARD_CONFIGS):
        launch, _ = pool.backward_launch(problem, config, out, index, y, main, y)
        yield Case("scale_shift_act_pool backward", dtype, str(config), launch, number == 0, False)
    for number, config in enumerate(triton_stats.STATS_CONFIGS):
        first, *_ = captured(lambda config=config: triton_stats.stats(y, config))  # type: ignore[misc]
        yield Case("statistics", dtype, str(config), first, number == 0, False)
