"""Offsets past 2^31: the kernels' index arithmetic on maps that are too large to allocate, in the interpreter and as PTX."""

import pytest
import torch
import triton
import triton.language as tl
from emulation.ptx import ptx_executor
from emulation.triton_interpreter import interpreter_executor

from fastres.kernels.common.triton_conv import as_index, block_indices, needs_int64, pixel_of
from fastres.kernels.common.triton_launch import Launch, executing_with

BLOCK = 16


@triton.jit
def offsets_kernel(
    out,  # [BLOCK] int64
    block,
    H,
    W,
    C,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Element offsets of rows of a map [N, H, W, C], the way every kernel computes them: to a pixel and back."""
    rows = block_indices(block, BLOCK, INT64)
    image, h, w = pixel_of(rows, H, W)
    at = ((as_index(image, INT64) * H + h) * W + w) * C + (C - 1)
    tl.store(out + tl.arange(0, BLOCK), at.to(tl.int64))


@pytest.mark.parametrize("executor", [interpreter_executor, ptx_executor], ids=["source", "ptx"])
@pytest.mark.parametrize(
    "shape", [(256, 224, 224, 512), (70_000, 56, 56, 2048), (3, 1, 1, 2**30), (2, 40_000, 30_000, 3)], ids=str
)
def test_offsets_of_a_virtual_map(shape, executor):
    n, h, w, c = shape
    assert needs_int64(n * h * w * c)
    last = n * h * w // BLOCK - 1
    for block in sorted({0, max(last // 2, 0), max(last, 0)}):
        out = torch.full((BLOCK,), -1, dtype=torch.int64)
        arguments = {"out": out, "block": block, "H": h, "W": w, "C": c}
        with executing_with(executor()):
            Launch(offsets_kernel, (1,), arguments, {"INT64": True, "BLOCK": BLOCK}).run()
        rows = torch.arange(BLOCK, dtype=torch.int64) + block * BLOCK
        assert torch.equal(out, rows * c + c - 1)


def test_without_the_flag_they_would_wrap():
    out = torch.full((BLOCK,), -1, dtype=torch.int64)
    arguments = {"out": out, "block": 256 * 224 * 224 // BLOCK - 1, "H": 224, "W": 224, "C": 512}
    with executing_with(ptx_executor()):
        Launch(offsets_kernel, (1,), arguments, {"INT64": False, "BLOCK": BLOCK}).run()
    assert (out < 0).all(), "2^31 elements and more need the flag, and the test above would notice its absence"
