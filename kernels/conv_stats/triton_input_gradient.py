"""Gradient of conv_stats' input: an implicit matrix product with BatchNorm's backward on both sides of it."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_choice import choose
from ..common.triton_conv import (
    ConvProblem,
    affine,
    as_index,
    block_indices,
    channels_last,
    inside,
    load_channels,
    pixel_of,
)
from ..common.triton_launch import Config, Launch
from ..common.triton_sums import merge_sums, write_part
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


@triton.jit
def phase_taps(
    phase, SIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, STEP: tl.constexpr
):
    """(first, count, offset) of the taps that meet the input pixels of one phase, along one axis.

    Input pixel h = i·STRIDE + phase meets tap r in output pixel p where p·STRIDE = h + PAD − r·DIL. That has a solution
    for r = first + j·STEP, j < count, and it is p = i + offset − j·DIL/gcd(STRIDE, DIL); STEP = STRIDE/gcd(STRIDE, DIL).
    """
    if STRIDE == 1:
        first = 0
        count = SIZE
        offset = PAD
    else:
        first = phase * 0 + SIZE
        for r in tl.static_range(0, STEP):
            first = tl.where((phase + PAD + SIZE * STRIDE * DIL - r * DIL) % STRIDE == 0, r, first)
        count = tl.maximum(SIZE - first + STEP - 1, 0) // STEP
        offset = (phase + PAD - first * DIL + SIZE * STRIDE * DIL) // STRIDE - SIZE * DIL
    return first, count, offset


@triton.jit
def input_gradient_kernel(
    grad_y,  # [N, P, Q, K]
    y,  # [N, P, Q, K]
    mean,  # [K] float32, as grad_mean and grad_var
    grad_mean,
    grad_var,
    factor,  # [K] float32, of grad_y
    weight,  # [K, R, S, C]
    x,  # [N, H, W, C], read where PROLOGUE
    scale,  # [C] float32, as center and shift
    center,
    shift,
    addend,  # [N, H, W, C], read where ADD
    grad_x,  # [N, H, W, C]
    partials,  # [tiles, 2, C] float32, written where PROLOGUE
    inverse_count,
    N,
    C,
    H,
    W,
    K,
    P,
    Q,
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
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_GRAD_MEAN: tl.constexpr,
    HAS_GRAD_VAR: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    POINTWISE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_x = scale·dz [+ addend], and per tile of pixels Σ dz·(x − center) and Σ dz.

    dz is the input gradient of G, masked by the ReLU.

    One program owns BLOCK_M input pixels of one phase (pixels alike modulo the stride: only the taps that meet them are
    visited) and BLOCK_N input channels; it reduces over those taps and the K output channels. A phase that no tap meets
    reduces over nothing, and its zeros pass the same epilogue.
    Bytes, each map once: reads grad_y, with HAS_GRAD_VAR y, with PROLOGUE x, with ADD addend, and weight;
    writes grad_x and partials.
    """
    C = C // C_UNIT * C_UNIT  # the same numbers, as multiples that the compiler sees
    K = K // K_UNIT * K_UNIT
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    DTYPE: tl.constexpr = grad_x.dtype.element_ty
    # Channel tiles of one pixel tile, then its phases, run side by side: they read the same part of grad_y and y.
    program = tl.program_id(0)
    tiles_n = tl.cdiv(C, BLOCK_N)
    part = program // tiles_n  # row of partials
    phase = part % PHASES
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    height = (H - phase_h + STRIDE_H - 1) // STRIDE_H  # rows of this phase; 0 in a map smaller than the stride
    width = (W - phase_w + STRIDE_W - 1) // STRIDE_W
    pixels = as_index(N, INT64) * height * width

    pixel = block_indices(part // PHASES, BLOCK_M, INT64)  # [BLOCK_M]
    live = pixel < pixels
    image, i, j = pixel_of(pixel, tl.maximum(height, 1), tl.maximum(width, 1))
    c = block_indices(program % tiles_n, BLOCK_N, False)  # [BLOCK_N]
    live_c = c < C

    first_r, count_r, offset_h = phase_taps(phase_h, R, STRIDE_H, PAD_H, DIL_H, STEP_H)
    first_s, count_s, offset_w = phase_taps(phase_w, S, STRIDE_W, PAD_W, DIL_W, STEP_W)
    blocks_k = tl.cdiv(K, BLOCK_K)
    steps = count_r * count_s * blocks_k
    steps = tl.where((part // PHASES) * as_index(BLOCK_M, INT64) < pixels, steps, 0)

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, steps):
        k = (step % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        live_k = k < K
        if POINTWISE:
            source = pixel
            seen = live
            tap = 0
        else:
            met = step // blocks_k
            tap_h = met // tl.maximum(count_s, 1)
            tap_w = met - tap_h * count_s
            p = i + offset_h - tap_h * (DIL_H * STEP_H // STRIDE_H)  # [BLOCK_M]
            q = j + offset_w - tap_w * (DIL_W * STEP_W // STRIDE_W)
            source = (image * P + p) * Q + q
            seen = live & inside(p, q, P, Q)
            tap = (first_r + tap_h * STEP_H) * S + first_s + tap_w * STEP_W
        m, constant, slope, times = gradient_vectors(
            mean, grad_mean, grad_var, factor, k, live_k, inverse_count, HAS_GRAD_MEAN, HAS_GRAD_VAR, HAS_FACTOR
        )
        g = gradient_tile(
            grad_y,
            y,
            source[:, None] * K + k[None, :],
            seen[:, None] & live_k[None, :],
            m,
            constant,
            slope,
            times,
            HAS_GRAD_Y,
            HAS_GRAD_MEAN,
            HAS_GRAD_VAR,
            HAS_FACTOR,
            DTYPE,
        )  # [BLOCK_M, BLOCK_K]
        line = as_index(k, INT64) * (R * S) + tap
        w = tl.load(
            weight + line[:, None] * C + c[None, :], mask=live_k[:, None] & live_c[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(g, w, accumulator, input_precision=PRECISION)

    if POINTWISE:
        target = pixel
    else:
        target = (image * H + i * STRIDE_H + phase_h) * W + j * STRIDE_W + phase_w
    offset = target[:, None] * C + c[None, :]
    mask = live[:, None] & live_c[None, :]
    if PROLOGUE:
        a = load_channels(scale, c, live_c)[None, :]
        b = load_channels(center, c, live_c)[None, :]
        d = load_channels(shift, c, live_c)[None, :]
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            accumulator = tl.where(affine(value, a, b, d) > 0.0, accumulator, 0.0)
        # Rows past the end add nothing: their gradient is 0.
        write_part(partials, part, 0, 2, c, C, accumulator * (value - b))
        write_part(partials, part, 1, 2, c, C, accumulator)
        accumulator = accumulator * a
    if ADD:  # another gradient of x itself: it passes neither the prologue nor its sums
        accumulator += tl.load(addend + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + offset, accumulator.to(DTYPE), mask=mask)


def default_config(problem: ConvProblem) -> Config:
    return choose("input_gradient_kernel", problem, lambda: configurations(problem))


def configurations(problem: ConvProblem) -> tuple[Config, ...]:
    """Block sizes worth timing, the best guess first; BLOCK_M pixels by BLOCK_N input channels, BLOCK_K output channels."""
    space: tuple[tuple[int, int, int, int, int], ...]
    if problem.sixteen_bit and single_elements(problem):
        space = ((64, 64, 32, 8, 3), (64, 32, 32, 8, 3), (64, 64, 32, 4, 2))
    elif problem.sixteen_bit:
        space = (
            (128, 64, 32, 8, 3),
            (64, 64, 64, 4, 3),
            (64, 64, 32, 4, 3),
            (64, 128, 32, 8, 3),
            (128, 64, 32, 8, 4),
        )
        if not problem.prologue:  # with its epilogue this one spills
            space += ((128, 128, 32, 8, 3),)
    elif problem.tensor_cores:
        space = ((64, 64, 32, 4, 3), (64, 32, 32, 4, 3))
    else:
        space = ((64, 64, 16, 8, 2), (64, 32, 16, 8, 2))
    found = (
        Config.of(
            num_warps=warps,
            num_stages=stages,
            BLOCK_M=m,
            BLOCK_N=block(n, problem.c),
            BLOCK_K=block(k, problem.k),
        )
        for m, n, k, warps, stages in space
    )
    return tuple(dict.fromkeys(found))


def tiles_of(problem: ConvProblem, config: Config) -> int:
    """Tiles of pixels, of all phases: every phase counts as many as the largest has, and none of its own are empty."""
    (step_h, step_w) = problem.stride
    largest = problem.n * -(-problem.h // step_h) * -(-problem.w // step_w)
    return -(-largest // int(config["BLOCK_M"])) * step_h * step_w


def input_gradient(
    problem: ConvProblem,
    gradients: Gradients,
    weight: Tensor,
    prologue: Prologue,
    config: Config | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_x [N, C, H, W] in channels_last, grad_scale [C], grad_shift [C]); the vectors None without a prologue.

    weight: [K, C, R, S] dense in channels_last. addend: [N, C, H, W] or None, added to grad_x.
    """
    config = config or default_config(problem)
    tiles = tiles_of(problem, config)
    grad_x = torch.empty_like(prologue.x, memory_format=torch.channels_last)
    partials = float32_like(grad_x, tiles, 2, problem.c) if problem.prologue else None
    Launch(
        kernel=input_gradient_kernel,
        grid=(tiles * -(-problem.c // int(config["BLOCK_N"])),),
        arguments={
            **gradients.arguments(problem),
            **prologue.arguments(),
            "weight": weight,
            "addend": None if addend is None else channels_last(addend.to(grad_x.dtype)),
            "grad_x": grad_x,
            "partials": partials,
            "N": problem.n,
            "C": problem.c,
            "H": problem.h,
            "W": problem.w,
            "K": problem.k,
            "P": problem.p,
            "Q": problem.q,
        },
        constants={
            **problem_constants(problem),
            **gradients.flags(),
            "ADD": addend is not None,
            "STEP_H": problem.stride[0] // gcd(problem.stride[0], problem.dilation[0]),
            "STEP_W": problem.stride[1] // gcd(problem.stride[1], problem.dilation[1]),
            **dict(config.constants),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    ).run()
    if partials is None:
        return grad_x, None, None
    merge, sums = merge_sums(partials)
    merge.run()
    return grad_x, sums[0], sums[1]
