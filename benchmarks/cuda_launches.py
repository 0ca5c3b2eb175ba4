"""How host code launches the CUDA kernels that use dynamic shared memory: recorded, without running them.

The host code is that of the library, compiled for the tests' emulation. Each problem here is one way through it: a
storage type, wide or narrow rows, a tile, what is fused. Addresses only have to be aligned: nothing is read.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # emulation

# Type and Precision of the structs: float32 as TF32 and exact to float32, float16, bfloat16
TYPES = ((0, 0), (0, 1), (1, 0), (2, 0))
# channels and filters, filter size, images of 56 x 56: 3 channels are no 16 bytes; the tiles that few and many rows get
SHAPES = tuple(itertools.product((3, 64, 128), (1, 3), (1, 32)))
ADDRESS = 1 << 20


@dataclass(frozen=True)
class Launch:
    """Threads of a block, bytes of dynamic shared memory."""

    threads: int
    shared: int


def geometries() -> Iterator[Any]:
    from emulation.cuda_problems import Geometry

    for channels, taps, images in SHAPES:
        pad = taps // 2
        yield Geometry(images, channels, 56, 56, channels, 56, 56, taps, taps, 1, 1, pad, pad, 1, 1)


def set_pointers(problem: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        if name == "prologue":
            problem.prologue = type(problem.prologue)(ADDRESS, ADDRESS, ADDRESS)
        else:
            setattr(problem, name, ADDRESS)
    return problem


def forward_problems() -> Iterator[Any]:
    from emulation.cuda_problems import ConvForward

    for (kind, precision), shape, prologue in itertools.product(TYPES, geometries(), ((), ("prologue",))):
        yield set_pointers(
            ConvForward(kind, precision, shape), ("x", "weight", "y", "partial", "mean", "var", *prologue)
        )


def gradient_problems(results: tuple[str, ...]) -> Iterator[Any]:
    """``results``: what is written."""
    from emulation.cuda_problems import ConvBackward

    statistics = (
        (),
        ("mean", "grad_mean", "y", "grad_var"),
        ("factor",),
        ("factor", "mean", "grad_mean", "y", "grad_var"),
    )
    prologues = ((), ("prologue", "grad_scale", "grad_shift"))
    for (kind, precision), shape, *fused in itertools.product(TYPES, geometries(), statistics, prologues):
        pointers = ("grad_y", "x", "weight", "workspace", *results, *itertools.chain(*fused))
        yield set_pointers(ConvBackward(kind, precision, shape), pointers)


# A source of tests/emulation, a function of it, and its problems.
SOURCES = (("conv_forward.cpp", "conv_forward", forward_problems()),)


def launches() -> dict[str, Launch]:
    """By mangled name: the largest launch of every kernel that the problems reach."""
    from emulation import cuda

    found: dict[str, Launch] = {}
    for source, function, problems in SOURCES:
        library = cuda.build(source)
        for problem in problems:
            for recorded in library.record(function, problem):
                before = found.get(recorded.name, Launch(0, 0))
                threads = recorded.block[0] * recorded.block[1] * recorded.block[2]
                found[recorded.name] = Launch(max(threads, before.threads), max(recorded.shared, before.shared))
    return found
