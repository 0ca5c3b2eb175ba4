"""Runs the Triton convolution forward: its configurations, its launches, its results. conv_stats and conv_act share it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.layout import absent
from ..common.triton_choice import EXECUTED, choose, offered
from ..common.triton_choice import capability as device_capability
from ..common.triton_conv import ConvProblem, channels_last
from ..common.triton_launch import Config, Launch
from .triton_forward import conv_forward, merge_statistics

MERGED_TILES, MERGED_CHANNELS = 128, 32
TMA_FROM = (9, 0)


@dataclass(frozen=True)
class Epilogue:
    """What is added to the product before it is stored: bias [K], residual like y, ReLU."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False


def flat(problem: ConvProblem) -> bool:
    """Whether the reduction walks taps and channels as one axis: so few channels would leave most of a step empty.

    Multiples of 8 don't walk it: a step of 16 takes them in aligned 16-byte loads.
    """
    return not problem.pointwise and problem.c < 16 and problem.c % 8 != 0


def _tile(
    m: int, n: int, k: int, warps: int, stages: int, tma: bool = False, patch: tuple[int, int] = (0, 0)
) -> Config:
    return Config.of(
        warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, TMA=tma, PATCH_H=patch[0], PATCH_W=patch[1]
    )


def configurations(problem: ConvProblem, capability: tuple[int, int] = (8, 0)) -> tuple[Config, ...]:
    """The tuning space of a problem on a device, default first: what compiles without spills and fits its shared memory."""
    blackwell, consumer = capability >= (10, 0), capability >= (12, 0)  # whose assembler spills where others don't
    if not problem.tensor_cores:
        small = _tile(64, 32, 16, 4, 2)
        return (small,) if consumer else (_tile(64, 64, 16, 8, 2), small)
    if problem.sixteen_bit and problem.c % 2:  # loads of single elements hold an address each: flat or not
        return _tile(128, 64, 16, 8, 3), _tile(64, 64, 32, 4, 2), _tile(64, 32, 32, 4, 2)
    if flat(problem):
        tiles = [_tile(64, 64, 32, 8 if consumer and problem.prologue else 4, 2)]
        return tuple(tiles if blackwell else [*tiles, _tile(128, 64, 32, 8, 2)])
    if problem.c <= 16:
        return _tile(128, 64, 16, 8, 4), _tile(64, 64, 16, 4, 4)
    if not problem.sixteen_bit:
        tiles = [_tile(64, 64, 32, 8, 3), _tile(64, 128, 32, 8, 3)]
        return tuple(tiles if consumer else [*tiles, _tile(128, 64, 32, 8, 3), _tile(128, 128, 32, 8, 2)])
    narrow = problem.k <= 64
    tiles = [_tile(128, 64, 32, 4, 4), _tile(128, 64, 32, 4, 3)]
    if not narrow:
        tiles += [_tile(64, 128, 32, 4, 3), _tile(64, 128, 64, 8, 3)]
    if not consumer:
        tiles += [_tile(64, 64, 32, 4, 4)]
        tiles = tiles if narrow else [_tile(128, 128, 32, 8, 4), *tiles]
    if capability >= TMA_FROM and tma_serves(problem):
        tiles += _tma_tiles(problem, narrow, 64 if problem.c >= 64 else 32)
    return tuple(tiles)


def tma_serves(problem: ConvProblem) -> bool:
    """Tensor descriptors need pixels a multiple of 16 bytes apart; a box steps by one, so no stride but 1."""
    whole = problem.sixteen_bit and problem.c % 8 == 0 and min(*problem.x_shape, *problem.w_shape) > 0
    return whole and problem.stride == (1, 1) and not flat(problem)


def _tma_tiles(problem: ConvProblem, narrow: bool, depth: int) -> list[Config]:
    if problem.pointwise:
        patch = (0, 0)
    else:  # the shape of 128 pixels that wastes fewest at the image's edge
        shapes = ((16, 8), (8, 16), (4, 32))
        patch = min(shapes, key=lambda s: triton.cdiv(problem.p, s[0]) * triton.cdiv(problem.q, s[1]))
    wide = 64 if narrow else 128
    return [_tile(128, wide, depth, 8, 3, True, patch)]


def capability_of(x: Tensor) -> tuple[int, int]:
    """Of the device that ``x`` lives on; elsewhere that of the architecture that the emulators run."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else EXECUTED


def default_config(problem: ConvProblem, device: tuple[int, int] | None = None) -> Config:
    """What was measured, else the first: never a variant that was compiled but not executed anywhere yet."""
    own = device_capability()
    if device is None or device == own:
        return choose("conv_forward", problem, lambda: configurations(problem, own))
    return offered("conv_forward", configurations(problem, device), device, problem.sixteen_bit)[0]


def _operands(problem: ConvProblem, config: Config, x: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """x and weight as the kernel takes them: the tensors, or descriptors of them."""
    if not config["TMA"]:
        return x, weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    n, c, h, w = problem.x_shape
    taps = problem.r * problem.s
    if problem.pointwise:
        pixels = TensorDescriptor(x, [n * h * w, c], [c, 1], [config["BLOCK_M"], config["BLOCK_K"]])
    else:
        box = [1, config["PATCH_H"], config["PATCH_W"], config["BLOCK_K"]]
        pixels = TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], box)
    filters = TensorDescriptor(
        weight, [problem.k, taps, c], [taps * c, c, 1], [config["BLOCK_N"], 1, config["BLOCK_K"]]
    )
    return pixels, filters


def row_tiles(problem: ConvProblem, config: Config) -> int:
    if config["PATCH_W"]:
        across, down = triton.cdiv(problem.q, config["PATCH_W"]), triton.cdiv(problem.p, config["PATCH_H"])
        return problem.n * down * across
    return triton.cdiv(problem.rows_out, config["BLOCK_M"])


def convolution(
    problem: ConvProblem,
    x: Tensor,
    weight: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    epilogue: Epilogue | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, K, P, Q] in channels_last, mean [K], var [K]); the last two are uninitialised without ``problem.stats``.

    vectors: scale, center, shift of the prologue ([C] float32).
    """
    epilogue = epilogue or Epilogue()
    config = config or default_config(problem, capability_of(x))
    x, weight = channels_last(x), channels_last(weight)
    y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tiles = row_tiles(problem, config)
    counts = partial = None
    if problem.stats:
        counts = torch.empty(tiles, dtype=torch.float32, device=x.device)
        partial = torch.empty((tiles, 2, problem.k), dtype=torch.float32, device=x.device)
    scale, center, shift, bias = (None if v is None else v.contiguous() for v in (*vectors, epilogue.bias))
    pixels, filters = _operands(problem, config, x, weight)
    residual = None if epilogue.residual is None else channels_last(epilogue.residual)
    Launch(
        conv_forward,
        (tiles * triton.cdiv(problem.k, config["BLOCK_N"]),),
        {
            "x": pixels,
            "weight": filters,
            "y": y,
            "scale": scale,
            "center": center,
            "shift": shift,
            "bias": bias,
            "residual": residual,
            "counts": counts,
            "partial": partial,
            "N": problem.n,
            "H": problem.h,
            "W": problem.w,
            "C": problem.c,
            "K": problem.k,
            "P": problem.p,
            "Q": problem.q,
        },
        _constants(problem, epilogue) | dict(config.constants),
        config.num_warps,
        config.num_stages,
    ).run()
    if counts is None or partial is None:
        return y, absent(y), absent(y)
    return y, *merged(counts, partial)


def _constants(problem: ConvProblem, epilogue: Epilogue) -> dict[str, Any]:
    return {
        "R": problem.r,
        "S": problem.s,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0],
        "PAD_W": problem.padding[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
        "C_UNIT": math.gcd(problem.c, 16),
        "K_UNIT": math.gcd(problem.k, 16),
        "IS_1X1": problem.pointwise,
        "FLAT": problem.c if flat(problem) else 0,
        "PROLOGUE": problem.prologue,
        "RELU": problem.relu,
        "STATS": problem.stats,
        "BIAS": epilogue.bias is not None,
        "RESIDUAL": epilogue.residual is not None,
        "OUT_RELU": epilogue.relu,
        "INT64": problem.int64,
        "PRECISION": problem.precision,
    }


def merged(counts: Tensor, partial: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased var) [K] of all tiles, merged MERGED_TILES at a time; NaN where there is nothing."""
    tiles, _, k = partial.shape
    new = partial.new_empty
    if not tiles:
        return partial.new_full((k,), float("nan")), partial.new_full((k,), float("nan"))
    while True:
        groups = triton.cdiv(tiles, MERGED_TILES)
        final = groups == 1
        merged_counts, merged = (None, None) if final else (new(groups), new((groups, 2, k)))
        mean, var = (new(k), new(k)) if final else (None, None)
        Launch(
            merge_statistics,
            (triton.cdiv(k, MERGED_CHANNELS), groups),
            {
                "counts": counts,
                "partial": partial,
                "merged_counts": merged_counts,
                "merged": merged,
                "mean": mean,
                "var": var,
                "TILES": tiles,
                "K": k,
            },
            {"FINAL": final, "BLOCK_T": MERGED_TILES, "BLOCK_N": MERGED_CHANNELS},
            num_warps=4,
        ).run()
        if mean is not None and var is not None:
            return mean, var
        assert merged_counts is not None and merged is not None
        counts, partial, tiles = merged_counts, merged, groups
