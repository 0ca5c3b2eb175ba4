"""Gradient of conv_stats' weights: a matrix product over all output pixels, split among programs and summed in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.layout import memory_format_of
from ..common.triton_choice import choose
from ..common.triton_conv import (
    ConvProblem,
    affine_act,
    as_index,
    block_indices,
    inside,
    load_channels,
    needs_int64,
    pixel_of,
)
from ..common.triton_launch import Config, Launch
from .triton_gradient_tiles import (
    Gradients,
    Prologue,
    block,
    float32_like,
    gradient_tile,
    gradient_vectors,
    problem_constants,
    single_elements,
)

WORKSPACE_BYTES = 64 * 2**20
PROGRAMS = 512  # worth aiming for: a few for each multiprocessor of any device; more splits only cost workspace traffic
FEWEST_STEPS = 4  # blocks of pixels a split should have at least


@triton.jit
def weight_gradient_kernel(
    grad_y,  # [N, P, Q, K]
    y,  # [N, P, Q, K]
    mean,  # [K] float32, as grad_mean and grad_var
    grad_mean,
    grad_var,
    factor,  # [K] float32, of grad_y
    x,  # [N, H, W, C]
    scale,  # [C] float32, as center and shift; read where PROLOGUE
    center,
    shift,
    result,  # [splits, K, R, S, C] float32; or the gradient itself where there is one split
    inverse_count,
    ROWS,  # N·P·Q
    C,
    H,
    W,
    K,
    P,
    Q,
    blocks,  # blocks of BLOCK_P pixels that one split owns
    stride_tap,  # of result, in elements: weights may be [K, R, S, C] or [K, C, R, S] in memory
    stride_c,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    C_UNIT: tl.constexpr,  # powers of two that divide C and K: how wide loads and stores may be
    K_UNIT: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_GRAD_MEAN: tl.constexpr,
    HAS_GRAD_VAR: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    POINTWISE: tl.constexpr,
    JOINT: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """result[split, k, r, s, c] = Σ G[n, p, q, k] · a[n, p·stride − pad + r·dil, q·stride − pad + s·dil, c].

    The sum runs over the pixels of one split.
    a = act(scale·(x − center) + shift) is recomputed as it is read, rounded to x's dtype, 0 in the padding.
    One program owns BLOCK_M output channels, BLOCK_N columns and a contiguous range of output pixels. Columns are input
    channels of one tap; with JOINT they run over all taps' channels together, so that few channels still fill a tile.
    Bytes, each map once: reads grad_y, with HAS_GRAD_VAR y, and x; writes result.
    """
    C = C // C_UNIT * C_UNIT  # the same numbers, as multiples that the compiler sees
    K = K // K_UNIT * K_UNIT
    DTYPE: tl.constexpr = x.dtype.element_ty
    # All tiles of a split are neighbours: they read the same pixels.
    program = tl.program_id(0)
    split = tl.program_id(1)
    if JOINT:
        tiles_n = tl.cdiv(R * S * C, BLOCK_N)
        column = block_indices(program % tiles_n, BLOCK_N, False)  # [BLOCK_N]
        tap = column // C  # [BLOCK_N]
        c = column - tap * C
        live_c = column < R * S * C
    else:
        tiles_c = tl.cdiv(C, BLOCK_N)
        tiles_n = R * S * tiles_c
        tap = (program % tiles_n) // tiles_c
        c = block_indices((program % tiles_n) % tiles_c, BLOCK_N, False)  # [BLOCK_N]
        live_c = c < C
    shift_h = (tap // S) * DIL_H - PAD_H
    shift_w = (tap % S) * DIL_W - PAD_W
    k = block_indices(program // tiles_n, BLOCK_M, False)  # [BLOCK_M]
    live_k = k < K

    m, constant, slope, times = gradient_vectors(
        mean, grad_mean, grad_var, factor, k, live_k, inverse_count, HAS_GRAD_MEAN, HAS_GRAD_VAR, HAS_FACTOR
    )
    if PROLOGUE:
        coefficient = load_channels(scale, c, live_c)[None, :]
        middle = load_channels(center, c, live_c)[None, :]
        constant_a = load_channels(shift, c, live_c)[None, :]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(ROWS, BLOCK_P))):
        pixel = block_indices(step, BLOCK_P, INT64)  # [BLOCK_P]
        live = pixel < ROWS
        g = gradient_tile(
            grad_y,
            y,
            pixel[:, None] * K + k[None, :],
            live[:, None] & live_k[None, :],
            m,
            constant,
            slope,
            times,
            HAS_GRAD_Y,
            HAS_GRAD_MEAN,
            HAS_GRAD_VAR,
            HAS_FACTOR,
            DTYPE,
        )  # [BLOCK_P, BLOCK_M]
        if POINTWISE:
            offset = pixel[:, None] * C + c[None, :]
            seen = live[:, None] & live_c[None, :]
        else:
            image, p, q = pixel_of(pixel, P, Q)
            if JOINT:
                h = (p * STRIDE_H)[:, None] + shift_h[None, :]  # [BLOCK_P, BLOCK_N]
                w = (q * STRIDE_W)[:, None] + shift_w[None, :]
                offset = ((image[:, None] * H + h) * W + w) * C + c[None, :]
                seen = inside(h, w, H, W) & live[:, None] & live_c[None, :]
            else:
                h = p * STRIDE_H + shift_h  # [BLOCK_P]
                w = q * STRIDE_W + shift_w
                offset = ((image * H + h) * W + w)[:, None] * C + c[None, :]
                seen = (inside(h, w, H, W) & live)[:, None] & live_c[None, :]
        a = tl.load(x + offset, mask=seen, other=0.0)  # [BLOCK_P, BLOCK_N]
        if PROLOGUE:
            a = tl.where(seen, affine_act(a, coefficient, middle, constant_a, RELU), 0.0).to(DTYPE)
        accumulator = tl.dot(tl.trans(g), a, accumulator, input_precision=PRECISION)

    row = as_index(split, INT64) * K + as_index(k, INT64)
    target = row[:, None] * (R * S * C) + (tap * stride_tap + c * stride_c)[None, :]
    tl.store(result + target, accumulator.to(result.dtype.element_ty), mask=live_k[:, None] & live_c[None, :])


@triton.jit
def sum_splits_kernel(
    partials,  # [splits, K, R·S, C] float32
    grad_weight,  # [K, R, S, C] or [K, C, R, S] in memory
    splits,
    ELEMENTS,  # K·R·S·C
    C,
    stride_tap,  # of grad_weight, in elements
    stride_c,
    TAPS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_weight = partials summed over splits, first to last, and rounded once.

    One program owns BLOCK elements. Bytes: reads partials, writes grad_weight.
    """
    element = block_indices(tl.program_id(0), BLOCK, INT64)  # [BLOCK]
    mask = element < ELEMENTS
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(partials + as_index(split, INT64) * ELEMENTS + element, mask=mask, other=0.0)
    row = element // C
    c = element - row * C
    k = row // TAPS
    tap = row - k * TAPS
    target = k * TAPS * C + tap * stride_tap + c * stride_c
    tl.store(grad_weight + target, total.to(grad_weight.dtype.element_ty), mask=mask)


def joint(problem: ConvProblem) -> bool:
    """Whether columns run over all taps together: where a tap's channels alone leave most of a tile empty."""
    return problem.c < 32 and not problem.pointwise


def columns_of(problem: ConvProblem, config: Config) -> int:
    """Tiles of columns."""
    size = int(config["BLOCK_N"])
    taps = problem.r * problem.s
    return -(-taps * problem.c // size) if joint(problem) else taps * -(-problem.c // size)


def splits_of(problem: ConvProblem, config: Config) -> tuple[int, int]:
    """(splits of the pixels, blocks of pixels in each): enough programs to fill a device, in a bounded workspace."""
    blocks = -(-problem.rows_out // int(config["BLOCK_P"]))
    tiles = columns_of(problem, config) * -(-problem.k // int(config["BLOCK_M"]))
    elements = problem.k * problem.r * problem.s * problem.c
    most = min(blocks // FEWEST_STEPS, PROGRAMS // max(tiles, 1), WORKSPACE_BYTES // max(4 * elements, 1))
    each = -(-blocks // max(most, 1))
    return max(-(-blocks // max(each, 1)), 1), each


def default_config(problem: ConvProblem) -> Config:
    return choose("weight_gradient_kernel", problem, lambda: configurations(problem))


def configurations(problem: ConvProblem) -> tuple[Config, ...]:
    """Block sizes worth timing, the best guess first; BLOCK_M output channels by BLOCK_N columns, BLOCK_P pixels."""
    space: tuple[tuple[int, int, int, int, int], ...]
    if problem.sixteen_bit and (single_elements(problem) or problem.int64):
        space = ((64, 64, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3))
    elif problem.sixteen_bit:
        space = (
            (64, 64, 64, 4, 3),
            (128, 64, 32, 8, 3),
            (128, 128, 32, 8, 3),
            (64, 128, 32, 8, 3),
            (64, 64, 32, 4, 4),
        )
    elif problem.tensor_cores:
        space = ((64, 64, 32, 4, 2), (64, 32, 32, 4, 3))
    else:
        space = ((64, 32, 16, 4, 2), (64, 64, 16, 4, 2))
    columns = problem.r * problem.s * problem.c if joint(problem) else problem.c
    found = (
        Config.of(
            num_warps=warps,
            num_stages=stages,
            BLOCK_M=block(m, problem.k),
            BLOCK_N=block(n, columns),
            BLOCK_P=p,
        )
        for m, n, p, warps, stages in space
    )
    return tuple(dict.fromkeys(found))


def strides_of(weight: Tensor) -> tuple[int, int]:
    """(elements between taps, between input channels) of a dense [K, C, R, S] tensor; a size of 1 has no say."""
    _, c, r, s = weight.shape
    if memory_format_of(weight) == torch.channels_last:
        return c, 1
    return 1, r * s


def weight_gradient(
    problem: ConvProblem, gradients: Gradients, prologue: Prologue, weight: Tensor, config: Config | None = None
) -> Tensor:
    """grad_weight [K, C, R, S] in the dtype and memory format of ``weight``, whose values are not read."""
    config = config or default_config(problem)
    splits, blocks = splits_of(problem, config)
    elements = weight.numel()
    grad_weight = torch.empty_like(weight, memory_format=memory_format_of(weight))
    stride_tap, stride_c = strides_of(grad_weight)
    whole = splits == 1
    partials = grad_weight if whole else float32_like(weight, splits, elements)
    sizes = {
        "ROWS": problem.rows_out,
        "C": problem.c,
        "H": problem.h,
        "W": problem.w,
        "K": problem.k,
        "P": problem.p,
        "Q": problem.q,
        "blocks": blocks,
        "stride_tap": stride_tap if whole else problem.c,
        "stride_c": stride_c if whole else 1,
    }
    tiles = columns_of(problem, config) * -(-problem.k // int(config["BLOCK_M"]))
    Launch(
        kernel=weight_gradient_kernel,
        grid=(tiles, splits),
        arguments={**gradients.arguments(problem), **prologue.arguments(), "result": partials, **sizes},
        constants={
            **problem_constants(problem),
            **gradients.flags(),
            "JOINT": joint(problem),
            **dict(config.constants),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    ).run()
    if not whole:
        Launch(
            kernel=sum_splits_kernel,
            grid=(-(-elements // 1024),),
            arguments={
                "partials": partials,
                "grad_weight": grad_weight,
                "splits": splits,
                "ELEMENTS": elements,
                "C": problem.c,
                "stride_tap": stride_tap,
                "stride_c": stride_c,
            },
            constants={
                "TAPS": problem.r * problem.s,
                "INT64": needs_int64(splits * elements),
                "BLOCK": 1024,
            },
        ).run()
    return grad_weight
