"""The Triton convolution forward: one implicit product for training and inference, and the merge of its statistics.

Maths, bytes and the choices made here: README.md of kernels/conv_stats and kernels/conv_act.
"""

import triton
import triton.language as tl

from ..common.triton_conv import (
    affine_act,
    as_index,
    block_indices,
    grouped_order,
    inside,
    load_channels,
    load_or_zero,
    pixel_of,
    tile_statistics,
)


@triton.jit
def output_rows(
    tile, N, P, Q, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_M: tl.constexpr, INT64: tl.constexpr
):
    """What a row tile covers: (row of y [M], image, p, q: scalars or [M], whether it exists) of its BLOCK_M rows.

    Either BLOCK_M rows of y in memory order, or a patch PATCH_H x PATCH_W of one image, as a tensor descriptor loads it.
    """
    if PATCH_W > 0:
        across = tl.cdiv(Q, PATCH_W)
        image, patch_row, patch_column = pixel_of(as_index(tile, INT64), tl.cdiv(P, PATCH_H), across)
        lane = tl.arange(0, BLOCK_M)
        p = patch_row * PATCH_H + lane // PATCH_W
        q = patch_column * PATCH_W + lane % PATCH_W
        return (image * P + p) * Q + q, image, p, q, (p < P) & (q < Q)
    else:
        row = block_indices(tile, BLOCK_M, INT64)
        image, p, q = pixel_of(row, P, Q)
        return row, image, p, q, row < as_index(N, INT64) * P * Q


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def conv_forward(
    x,  # [N·H·W, C], or a descriptor of it ([N, H, W, C] unless IS_1X1)
    weight,  # [K, R·S·C], or a descriptor of it as [K, R·S, C]
    y,  # [N·P·Q, K], written
    scale,  # [C] float32, and so center and shift; None without PROLOGUE
    center,
    shift,
    bias,  # [K], or None
    residual,  # [N·P·Q, K] in the dtype of y, or None
    counts,  # [row tiles] float32, written: rows in each row tile; None without STATS
    partial,  # [row tiles, 2, K] float32, written: mean and Σ(y − mean)² in each row tile; None without STATS
    N,
    H,
    W,
    C,
    K,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    C_UNIT: tl.constexpr,  # powers of two that divide C and K: how wide loads and stores may be
    K_UNIT: tl.constexpr,
    IS_1X1: tl.constexpr,  # stride 1, no padding: a plain product, no pixel arithmetic
    FLAT: tl.constexpr,  # 0: the reduction walks channel blocks, and taps within one; else C: it walks taps·C as one axis
    PROLOGUE: tl.constexpr,
    RELU: tl.constexpr,
    STATS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OUT_RELU: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,  # x and weight are tensor descriptors
    PATCH_H: tl.constexpr,  # with TMA unless IS_1X1: a row tile is a patch of PATCH_H x PATCH_W pixels; else 0
    PATCH_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = conv(act(scale·(x − center) + shift), weight), or with bias, residual and ReLU after it; and y's statistics.

    One program owns BLOCK_M pixels x BLOCK_N channels of y and walks the whole reduction over R·S·C in BLOCK_K steps:
    y is stored once, and its statistics are taken from the rounded tile before it leaves. Bytes, with every tile of x and
    weight served by the L2 cache after its first reading: x, weight, residual read once, y written once, and
    tiles·(2·K + 1)·4 of partial statistics.
    """
    C = C // C_UNIT * C_UNIT  # the same numbers, as multiples that the compiler sees
    K = K // K_UNIT * K_UNIT
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile_m, tile_n = grouped_order(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
    row, image, p, q, row_exists = output_rows(tile_m, N, P, Q, PATCH_H, PATCH_W, BLOCK_M, INT64)
    k = block_indices(tile_n, BLOCK_N, INT64)  # [BLOCK_N] channels of y
    k_exists = k < K

    TAPS: tl.constexpr = R * S
    if FLAT > 0:
        steps = tl.cdiv(TAPS * FLAT, BLOCK_K)
    else:
        steps = tl.cdiv(C, BLOCK_K) * TAPS
    lane = tl.arange(0, BLOCK_K)
    if IS_1X1:
        pixel = row * C  # [BLOCK_M] element offset of a row's pixel in x
    else:
        h0 = p * STRIDE_H - PAD_H  # [BLOCK_M] where a row's window begins
        w0 = q * STRIDE_W - PAD_W
        pixel = ((image * H + h0) * W + w0) * C
    filters = k * (TAPS * C)  # [BLOCK_N] element offset of a filter in weight

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(steps):
        # c: [BLOCK_K] channels of this step; r, s: its tap, scalars or (FLAT) [BLOCK_K]
        if FLAT > 0:
            axis = step * BLOCK_K + lane
            c, r, s = axis % FLAT, axis // (S * FLAT), axis // FLAT % S
            c_exists = axis < TAPS * FLAT
            across = axis
        else:
            # taps inside: neighbouring steps read the same lines of x, and divide by constants only
            block = step // TAPS
            tap = step - block * TAPS
            c, r, s = block * BLOCK_K + lane, tap // S, tap % S
            c_exists = c < C
            across = tap * C + c
        if IS_1X1:
            read = row_exists[:, None] & c_exists[None, :]
        elif FLAT > 0:
            h = h0[:, None] + (r * DILATION_H)[None, :]
            w = w0[:, None] + (s * DILATION_W)[None, :]
            read = row_exists[:, None] & c_exists[None, :] & inside(h, w, H, W)
        else:
            in_image = row_exists & inside(h0 + r * DILATION_H, w0 + s * DILATION_W, H, W)  # [BLOCK_M]
            read = in_image[:, None] & c_exists[None, :]
        if TMA:
            if IS_1X1:
                a = x.load([tile_m * BLOCK_M, block * BLOCK_K])
            else:
                first = tl.cdiv(Q, PATCH_W)
                corner_h = tile_m // first % tl.cdiv(P, PATCH_H) * PATCH_H - PAD_H + r * DILATION_H
                corner_w = tile_m % first * PATCH_W - PAD_W + s * DILATION_W
                a = x.load([tl.cast(image, tl.int32), corner_h, corner_w, block * BLOCK_K])
                a = a.reshape(BLOCK_M, BLOCK_K)
            b = weight.load([tile_n * BLOCK_N, tap, block * BLOCK_K]).reshape(BLOCK_N, BLOCK_K).T
        else:
            offset = c
            if not IS_1X1:
                offset += as_index((r * DILATION_H * W + s * DILATION_W) * C, INT64)
            a = load_or_zero(x + pixel[:, None] + offset[None, :], read)
            b = load_or_zero(
                weight + filters[None, :] + as_index(across, INT64)[:, None], c_exists[:, None] & k_exists[None, :]
            )
        if PROLOGUE:
            z = affine_act(
                a,
                load_channels(scale, c, c_exists)[None, :],
                load_channels(center, c, c_exists)[None, :],
                load_channels(shift, c, c_exists)[None, :],
                RELU,
            )
            # Padding is zero after the prologue; a channel past the end is zero by its vectors.
            if FLAT > 0:
                z = tl.where(read, z, 0.0)
            elif not IS_1X1:
                z = tl.where(in_image[:, None], z, 0.0)
            a = z.to(y.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    at = row[:, None] * K + k[None, :]
    exists = row_exists[:, None] & k_exists[None, :]
    if BIAS:
        acc += load_channels(bias, k, k_exists)[None, :]
    if RESIDUAL:
        acc += load_or_zero(residual + at, exists).to(tl.float32)
    if OUT_RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)
    rounded = acc.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=exists)
    if STATS:
        count, mean, m2 = tile_statistics(rounded.to(tl.float32), row_exists)
        into = partial + as_index(tile_m, INT64) * (2 * K) + k
        tl.store(into, mean, mask=k_exists)
        tl.store(into + K, m2, mask=k_exists)
        tl.store(counts + tile_m, count, mask=tile_n == 0)


@triton.jit(do_not_specialize=["TILES"])
def merge_statistics(
    counts,  # [TILES] float32
    partial,  # [TILES, 2, K] float32: mean and Σ(y − mean)² of each tile
    merged_counts,  # [groups] float32, written unless FINAL
    merged,  # [groups, 2, K] float32, written unless FINAL
    mean,  # [K] float32, written if FINAL
    var,  # [K] float32, written if FINAL
    TILES,
    K,
    FINAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merges statistics of neighbouring tiles; the last launch (FINAL) divides by the count.

    One program owns BLOCK_T tiles x BLOCK_N channels, all loaded at once: the merged mean, taken relative to the first
    tile's, then M2 = Σ m2 + count·(mean − merged mean)². The order of all sums is fixed by the shapes. Bytes: partial and
    counts (once per channel block) read once, a BLOCK_T-th of them written.
    """
    group = tl.program_id(1)
    tile = group * BLOCK_T + tl.arange(0, BLOCK_T)  # [T]
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    k_exists = k < K
    count = tl.load(counts + tile, mask=tile < TILES, other=0.0)  # [T]
    at = tl.cast(tile, tl.int64)[:, None] * (2 * K) + k[None, :]
    exists = (tile < TILES)[:, None] & k_exists[None, :]
    means = tl.load(partial + at, mask=exists, other=0.0)  # [T, N]
    m2 = tl.load(partial + at + K, mask=exists, other=0.0)
    first = tl.load(partial + tl.cast(group, tl.int64) * BLOCK_T * (2 * K) + k, mask=k_exists, other=0.0)
    weight = count[:, None]
    total = tl.sum(count, axis=0)
    shifted = tl.where(exists, means - first[None, :], 0.0)
    relative = tl.sum(weight * shifted, axis=0) / total  # [N]
    apart = shifted - relative[None, :]
    both = tl.sum(m2 + weight * apart * apart, axis=0)
    if FINAL:
        tl.store(mean + k, first + relative, mask=k_exists)
        tl.store(var + k, both / total, mask=k_exists)
    else:
        into = merged + tl.cast(group, tl.int64) * (2 * K) + k
        tl.store(into, first + relative, mask=k_exists)
        tl.store(into + K, both, mask=k_exists)
        tl.store(merged_counts + group, total, mask=tl.program_id(0) == 0)
