"""How host code launches the CUDA kernels that use dynamic shared memory: recorded, without running them.

The host code is that of the library, compiled for the tests' emulation. Each problem here is one way through it: a
storage type, wide or narrow rows, a tile, what is fused. Addresses only have to be aligned: nothing is read.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # emulation

# Type and Precision of the structs: float32 as TF32 and exact to float32, float16, bfloat16
TYPES = ((0, 0), (0, 1), (1, 0), (2, 0))
# Channels and filters, filter size, images of 56 x 56: 3 channels are no 16 bytes; few and many rows get different tiles.
SHAPES = tuple(itertools.product(((3, 64), (64, 64), (64, 128), (128, 128)), (1, 3), (1, 32)))
PROLOGUES = ((), ("prologue", "grad_scale", "grad_shift"))
STATISTICS = (), ("factor",), ("mean", "grad_mean", "y", "grad_var")
ADDRESS = 1 << 20


@dataclass(frozen=True)
class Launch:
    """Threads of a block, bytes of dynamic shared memory."""

    threads: int
    shared: int


def geometries() -> Iterator[Any]:
    from emulation.cuda_problems import Geometry

    for (channels, filters), taps, images in SHAPES:
        pad = taps // 2
        yield Geometry(images, channels, 56, 56, filters, 56, 56, taps, taps, 1, 1, pad, pad, 1, 1)


def with_pointers(problem: Any, names: Iterable[str]) -> Any:
    for name in names:
        if name == "prologue":
            problem.prologue = type(problem.prologue)(ADDRESS, ADDRESS, ADDRESS)
        else:
            setattr(problem, name, ADDRESS)
    return problem


def forward_problems() -> Iterator[Any]:
    from emulation.cuda_problems import ConvForward

    for (kind, precision), shape, prologue in itertools.product(TYPES, geometries(), PROLOGUES):
        names = ("x", "weight", "y", "partial", "mean", "var", *prologue[:1])
        yield with_pointers(ConvForward(kind, precision, shape), names)


def gradient_problems(result: str) -> Iterator[Any]:
    from emulation.cuda_problems import ConvBackward

    for (kind, precision), shape, *fused in itertools.product(TYPES, geometries(), STATISTICS, PROLOGUES):
        names = ("grad_y", "x", "weight", "workspace", result, *itertools.chain(*fused))
        yield with_pointers(ConvBackward(kind, precision, shape), names)


def norm_problems(library: Any, backward: bool) -> Iterator[Any]:
    """Few rows, which need no shared memory beyond that of the sums: more is only taken where it leaves two blocks."""
    from emulation.cuda_problems import Chip, Norm

    chip = Chip(108, 164 << 10, 163 << 10)
    for kind, channels, residual in itertools.product((0, 1, 2), (3, 64), ((), ("residual",))):
        names = (
            "y",
            "weight",
            "bias",
            "mean",
            "var",
            "out",
            "grad",
            "grad_y",
            "grad_weight",
            "grad_bias",
            "partial",
            "arrived",
        )
        problem = with_pointers(Norm(kind, True, 1e-5, 128, channels), (*names, *residual))
        reason = library.call("make_plan", chip, int(backward), problem, result=ctypes.c_char_p)
        assert reason is None, reason
        yield problem


def sources() -> Iterator[tuple[Any, str, Iterator[Any]]]:
    """Libraries of tests/emulation, their functions, and problems for these."""
    from emulation import cuda

    yield cuda.build("conv_forward.cpp"), "conv_forward", forward_problems()
    yield cuda.build("conv_input_gradient.cpp"), "input_gradient", gradient_problems("grad_x")
    # No test runs all of its kernels in emulation: nothing is gained by optimising them.
    yield cuda.build("weight_gradient.cpp", ("-O0",)), "weight_gradient", gradient_problems("grad_weight")
    library = cuda.build("batch_norm_act.cpp")
    for name in ("forward", "backward"):
        yield library, name, norm_problems(library, name == "backward")


def launches() -> dict[str, Launch]:
    """By mangled name: the largest launch of every kernel that the problems reach."""
    found: dict[str, Launch] = {}
    for library, function, problems in sources():
        for problem in problems:
            for recorded in library.record(function, problem):
                before = found.get(recorded.name, Launch(0, 0))
                threads = recorded.block[0] * recorded.block[1] * recorded.block[2]
                found[recorded.name] = Launch(max(threads, before.threads), max(recorded.shared, before.shared))
    return found
