"""Small kernels that the emulation tools are proven on, with the functions that launch them and inputs for them.

BUG plants an error: an off-by-one mask, a tile stored twice, a merge that depends on the order of its sides.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.common.triton_launch import Launch, executing_with


@triton.jit
def matmul(
    a,
    b,
    out,
    bias,
    M,
    N,
    K,
    BUG: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [M, N] = relu(a [M, K] · b [K, N] + bias [N]), all row-major; one program a tile."""
    columns = tl.cdiv(N, BN)
    m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m[:, None] < M + BUG) & (k[None, :] < K), other=0.0)
        right = tl.load(b + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    acc = tl.maximum(acc, 0.0)
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def convolution(x, w, y, N, H, W, C, K, P, Q, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
                BUG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """y [N, P, Q, K] = convolution of x [N, H, W, C] with w [R, S, C, K]; an implicit product over R·S·C."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    image, pixel = m // (P * Q), m % (P * Q)
    top, left = pixel // Q * STRIDE - PAD, pixel % Q * STRIDE - PAD
    acc = tl.zeros((BM, BN), tl.float32)
    blocks = tl.cdiv(C, BK)
    for step in range(R * S * blocks):
        tap, c = step // blocks, step % blocks * BK + tl.arange(0, BK)
        h, v = top + tap // S, left + tap % S
        inside = (m < N * P * Q) & (h >= 0) & (h < H + BUG) & (v >= 0) & (v < W)
        pointers = x + ((image * H + h) * W + v)[:, None] * C + c[None, :]
        taken = tl.load(pointers, mask=inside[:, None] & (c[None, :] < C), other=0.0)
        weight = tl.load(
            w + (tap * C + c)[:, None] * K + k[None, :], mask=(c[:, None] < C) & (k[None, :] < K), other=0.0
        )
        acc = tl.dot(taken, weight, acc)
    tl.store(
        y + m[:, None] * K + k[None, :], acc.to(y.dtype.element_ty), mask=(m[:, None] < N * P * Q) & (k[None, :] < K)
    )


@triton.jit
def row_sums(x, sums, ROWS, COLUMNS, BR: tl.constexpr, BC: tl.constexpr):
    """sums [ROWS] float32 of x [ROWS, COLUMNS]."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, COLUMNS, BC):
        column = start + tl.arange(0, BC)
        mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
        total += tl.sum(
            tl.load(x + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32), axis=1
        )
    tl.store(sums + row, total, mask=row < ROWS)


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Chan's merge of (count, mean, M2), the same to the last bit when its sides are exchanged.

    A reduction runs as a butterfly, so each lane has its own order of the sides: all must come to the same result.
    """
    count = count_a + count_b
    inverse = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)
    delta = mean_b - mean_a
    mean = 0.5 * (mean_a + mean_b) + delta * (0.5 * (count_b - count_a) * inverse)
    return count, mean, (m2_a + m2_b) + delta * delta * (count_a * count_b * inverse)


@triton.jit
def lopsided_merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """The usual formula: exchanged sides differ by rounding."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / tl.maximum(count, 1.0), 0.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def column_statistics(x, out, ROWS, COLUMNS, BUG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out [2, COLUMNS] float32: mean and M2 of the columns of x [ROWS, COLUMNS], merged over tiles of rows."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    count, mean, m2 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for start in range(0, ROWS, BR):
        row = start + tl.arange(0, BR)
        mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
        value = tl.load(x + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
        leaves = (mask.to(tl.float32), value, tl.zeros((BR, BC), tl.float32))
        if BUG:
            tile = tl.reduce(leaves, 0, lopsided_merge)
        else:
            tile = tl.reduce(leaves, 0, merge)
        count, mean, m2 = merge(count, mean, m2, tile[0], tile[1], tile[2])
    tl.store(out + column, mean, mask=column < COLUMNS)
    tl.store(out + COLUMNS + column, m2, mask=column < COLUMNS)


@triton.jit
def activate(y, scale, shift, out, SIZE, CHANNELS, BUG: tl.constexpr, BLOCK: tl.constexpr):
    """out = relu(scale·y + shift), channels innermost; BUG: tiles overlap by half."""
    at = tl.program_id(0) * (BLOCK // 2 if BUG else BLOCK) + tl.arange(0, BLOCK)
    mask = at < SIZE
    channel = at % CHANNELS
    z = tl.load(y + at, mask=mask).to(tl.float32) * tl.load(scale + channel) + tl.load(shift + channel)
    tl.store(out + at, tl.where(z > 0, z, 0.0).to(out.dtype.element_ty), mask=mask)


@triton.jit
def arithmetic(a, b, out, BLOCK: tl.constexpr, OP: tl.constexpr):
    """out = a OP b in the arithmetic of their own dtype."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "neg":
        z = -x
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "where":
        z = tl.where((x > y) & (x > 0), x, y)
    else:
        z = x + y.to(tl.float32)
    tl.store(out + at, z.to(out.dtype.element_ty))


@triton.jit
def careless_sum(x, out, SIZE, BLOCK: tl.constexpr):
    """out = sum of x [SIZE], with no value given for the lanes beyond it."""
    at = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + at, mask=at < SIZE), axis=0))


@triton.jit
def scatter_add(at, values, out, BLOCK: tl.constexpr):
    """out[at[i]] += values[i], float32, by atomics."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(at + i), tl.load(values + i))


@triton.jit
def described(source, target, H, W, BH: tl.constexpr, BW: tl.constexpr):
    """target [H, W] = 2·source shifted down by one row; source by a host-side descriptor, target by one made here."""
    row, column = tl.program_id(0) * BH, tl.program_id(1) * BW
    tile = source.load([row - 1, column])
    made = tl.make_tensor_descriptor(target, [H, W], [W, 1], [BH, BW])
    made.store([row, column], tile * 2)


def launch_matmul(
    a: Tensor, b: Tensor, bias: Tensor, out: Tensor, tile=(32, 32, 32), warps=4, stages=3, bug=0
) -> Launch:
    (m, k), n = a.shape, b.shape[1]
    constants = dict(
        BUG=bug, PRECISION="tf32" if a.dtype == torch.float32 else "ieee", BM=tile[0], BN=tile[1], BK=tile[2]
    )
    grid = (triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1]),)
    return Launch(matmul, grid, dict(a=a, b=b, out=out, bias=bias, M=m, N=n, K=k), constants, warps, stages)


def launch_convolution(
    x: Tensor, w: Tensor, y: Tensor, stride=1, padding=1, tile=(64, 32, 32), warps=4, stages=3, bug=0
) -> Launch:
    (n, h, v, c), (r, s, _, k), (_, p, q, _) = x.shape, w.shape, y.shape
    constants = dict(R=r, S=s, STRIDE=stride, PAD=padding, BUG=bug, BM=tile[0], BN=tile[1], BK=tile[2])
    grid = (triton.cdiv(n * p * q, tile[0]), triton.cdiv(k, tile[1]))
    return Launch(convolution, grid, dict(x=x, w=w, y=y, N=n, H=h, W=v, C=c, K=k, P=p, Q=q), constants, warps, stages)


def launch_row_sums(x: Tensor, sums: Tensor, block=(8, 64), warps=4) -> Launch:
    rows, columns = x.shape
    constants = dict(BR=block[0], BC=block[1])
    return Launch(
        row_sums, (triton.cdiv(rows, block[0]),), dict(x=x, sums=sums, ROWS=rows, COLUMNS=columns), constants, warps
    )


def launch_column_statistics(x: Tensor, out: Tensor, block=(32, 16), warps=4, bug=False) -> Launch:
    rows, columns = x.shape
    constants = dict(BUG=bug, BR=block[0], BC=block[1])
    grid = (triton.cdiv(columns, block[1]),)
    return Launch(column_statistics, grid, dict(x=x, out=out, ROWS=rows, COLUMNS=columns), constants, warps)


def launch_activate(y: Tensor, scale: Tensor, shift: Tensor, out: Tensor, block=256, bug=False) -> Launch:
    size, channels = y.numel(), y.shape[-1]
    arguments = dict(y=y, scale=scale, shift=shift, out=out, SIZE=size, CHANNELS=channels)
    return Launch(activate, (triton.cdiv(size, block // 2 if bug else block),), arguments, dict(BUG=bug, BLOCK=block))


def launch_arithmetic(a: Tensor, b: Tensor, out: Tensor, op: str, block=256) -> Launch:
    return Launch(arithmetic, (a.numel() // block,), dict(a=a, b=b, out=out), dict(BLOCK=block, OP=op))


def launch_described(source: Tensor, target: Tensor, block=(16, 32)) -> Launch:
    from triton.tools.tensor_descriptor import TensorDescriptor

    h, w = target.shape
    arguments = dict(source=TensorDescriptor.from_tensor(source, list(block)), target=target, H=h, W=w)
    grid = (triton.cdiv(h, block[0]), triton.cdiv(w, block[1]))
    return Launch(described, grid, arguments, dict(BH=block[0], BW=block[1]))


def run(launch: Launch, executor: Callable[[Launch], None]) -> None:
    with executing_with(executor):
        launch.run()


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def matmul_inputs(dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 160), (160, 64)))
    return a, b, torch.randn(64, generator=generator), nans(64, 64, dtype=dtype)
