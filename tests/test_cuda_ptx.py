"""The PTX that nvcc emits for the CUDA kernels of scale_shift_act, run by the PTX interpreter: bit for bit, and races caught.

The same sources run as C++ in test_cuda_emulation.py. Here the compiler's own loads, conversions and barriers run.
"""

import re
import subprocess
from pathlib import Path

import native_cases as cases
import pytest
import torch
from conftest import require_program
from emulation.errors import SharedMemoryRace
from emulation.memory import GuardedMemory
from emulation.ptx import run_ptx
from test_cuda_emulation import KINDS, TYPES, Affine, Problem

ROOT = Path(__file__).parents[1]
SOURCE = """
#include <cuda_fp16.h>
#define FASTRES_LAUNCH(...)
#include "kernels/scale_shift_act/cuda_kernel.cuh"
namespace fastres::cuda {
template __global__ void forward_rows<BFloat, 8, Residual::affine>(Problem, int);
template __global__ void backward_rows<Half, 8, Residual::affine>(Problem, int);
template __global__ void add_parts<3>(Problem, int64_t);
}
"""
THREADS = 256


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "kernels.cu").write_text(SOURCE)
    command = [
        require_program("nvcc"),
        "-ptx",
        "-arch=sm_80",
        "-std=c++20",
        f"-I{ROOT}",
        "kernels.cu",
        "-o",
        "kernels.ptx",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "kernels.ptx").read_text()


def problem(y, main, residual, res):
    images, channels, height, width = y.shape
    p = Problem(TYPES[y.dtype], False, True, KINDS["affine"], images, channels, height * width)
    p.main, p.res = (Affine(*(v.data_ptr() for v in some)) for some in (main, res))
    p.y, p.residual = y.data_ptr(), residual.data_ptr()
    return p


def inputs(dtype, shape=(2, 24, 5, 7)):
    g = torch.Generator().manual_seed(0)
    y, residual = (cases.exact(shape, g, dtype=dtype, fmt=torch.channels_last) for _ in range(2))
    grad = cases.exact(shape, g, -4, 4, 1.0, dtype=dtype, fmt=torch.channels_last)
    main, res = (cases.coefficients(shape[1], g) for _ in range(2))
    return y, residual, grad, main, res


def start(text, name, grid, p, number, tensors):
    memory = GuardedMemory({str(i): t for i, t in enumerate(tensors)})
    entry = next(e for e in re.findall(r"\.entry\s+(\w+)", text) if name in e)
    run_ptx(text, memory, grid, THREADS, 0, [bytes(p), number], entry=entry)


def test_forward(ptx):
    y, residual, _, main, res = inputs(torch.bfloat16)
    out = torch.full_like(y, float("nan"))
    p = problem(y, main, residual, res)
    p.out = out.data_ptr()
    start(ptx, "forward_rows", (2, 3), p, 2, [y, residual, out, *main, *res])
    assert torch.equal(out, cases.forward(y, main, residual, res, True))


def backward(text):
    y, residual, grad, main, res = inputs(torch.float16)
    channels, parts = y.shape[1], 2
    results = {name: torch.full_like(y, float("nan")) for name in ("grad_y", "grad_residual")}
    sums = {name: torch.full((channels,), float("nan")) for name in ("grad_scale", "grad_shift", "grad_res_scale")}
    partial = torch.full((parts * 3 * channels,), float("nan"))
    p = problem(y, main, residual, res)
    p.grad, p.partial = grad.data_ptr(), partial.data_ptr()
    p.grad_y, p.grad_residual = (t.data_ptr() for t in results.values())
    for i, t in enumerate(sums.values()):
        p.sum_out[i] = t.data_ptr()
    start(text, "backward_rows", (2, parts), p, 2, [y, residual, grad, *results.values(), partial, *main, *res])
    start(text, "add_parts", (1, 3), p, parts, [partial, *sums.values()])
    return {**results, **sums}, cases.backward(grad, y, main, residual, res, True)


def test_backward(ptx):
    ours, expected = backward(ptx)
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


def test_a_removed_barrier_is_a_race(ptx):
    barriers = list(re.finditer(r"bar(rier)?\.(cta\.)?sync[^;]*;", ptx))
    assert barriers
    for found in barriers:
        with pytest.raises(SharedMemoryRace):
            backward(ptx[: found.start()] + ptx[found.end() :])
