"""The CUDA kernels of scale_shift_act, compiled by g++ and run thread by thread, against float64 formulas."""

import ctypes
import itertools
import subprocess
from pathlib import Path

import native_cases as cases
import pytest
import torch

SOURCE = Path(__file__).parent / "emulation" / "scale_shift_act.cpp"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KINDS = {"none": 0, "plain": 1, "affine": 2}


class Affine(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("scale", "center", "shift")]


class Problem(ctypes.Structure):
    """kernels/scale_shift_act/cuda_problem.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("planes", ctypes.c_bool),
        ("relu", ctypes.c_bool),
        ("residual_kind", ctypes.c_int),
        ("images", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("plane", ctypes.c_int64),
        ("main", Affine),
        ("res", Affine),
        *((name, ctypes.c_void_p) for name in ("y", "residual", "out", "grad", "grad_y", "grad_residual", "partial")),
        ("sum_out", ctypes.c_void_p * 3),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """No compiler is a failure, not a skip: these kernels have no other test without a GPU."""
    out = tmp_path_factory.mktemp("emulation") / "scale_shift_act.so"
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, str(SOURCE), "-o", str(out)], check=True)
    lib = ctypes.CDLL(str(out))
    lib.partial_size.restype = lib.parts.restype = ctypes.c_int64
    lib.problem_size.restype = ctypes.c_uint64
    assert lib.problem_size() == ctypes.sizeof(Problem)
    return lib


def filled(like, offset=0):
    """Like ``like``, all NaN (what a kernel forgets to write stays visible), ``offset`` elements off alignment."""
    room = torch.full((like.numel() + offset,), float("nan"), dtype=like.dtype)
    return torch.as_strided(room, like.shape, like.stride(), offset)


def run(lib, y, main, residual, res, relu, grad=None, want_residual=True, offset=0, order=0):
    """Forward (grad None) or backward: the output, or the gradients by name."""
    planes = y.is_contiguous()
    kind = "affine" if res is not None else "plain" if residual is not None else "none"
    p = Problem(TYPES[y.dtype], planes, relu, KINDS[kind], y.shape[0], y.shape[1], y.shape[2] * y.shape[3])
    p.main = Affine(*(v.data_ptr() for v in main))
    if res is not None:
        p.res = Affine(*(v.data_ptr() for v in res))
    p.y = y.data_ptr()
    p.residual = None if residual is None else residual.data_ptr()
    if grad is None:
        out = filled(y, offset)
        p.out = out.data_ptr()
        lib.run(ctypes.byref(p), 0, order)
        return out
    p.grad = grad.data_ptr()
    grads = {"grad_y": filled(y, offset)}
    p.grad_y = grads["grad_y"].data_ptr()
    if kind == "affine" or (kind == "plain" and relu and want_residual):
        grads["grad_residual"] = filled(y)
        p.grad_residual = grads["grad_residual"].data_ptr()
    partial = torch.full((lib.partial_size(ctypes.byref(p)),), float("nan"))
    p.partial = partial.data_ptr()
    for i, name in enumerate(("grad_scale", "grad_shift", "grad_res_scale")[: 3 if kind == "affine" else 2]):
        grads[name] = torch.full((y.shape[1],), float("nan"))
        p.sum_out[i] = grads[name].data_ptr()
    lib.run(ctypes.byref(p), 1, order)
    assert not (partial.isnan().any() and y.isfinite().all())
    return grads


SHAPES = (
    (2, 1, 5, 7),
    (3, 3, 9, 4),
    (2, 17, 6, 5),
    (2, 64, 9, 8),
    (1, 136, 4, 4),
    (2, 8, 70, 64),
    (1, 2, 70, 91),
    (600, 4, 2, 8),
)


def problems(shape, dtype, fmt):
    g = torch.Generator().manual_seed(0)
    y, residual = (cases.exact(shape, g, dtype=dtype, fmt=fmt) for _ in range(2))
    grad = cases.exact(shape, g, -4, 4, 1.0, dtype=dtype, fmt=fmt)
    main, res = (cases.coefficients(shape[1], g) for _ in range(2))
    for kind, relu in itertools.product(KINDS, (True, False)):
        yield y, main, (None if kind == "none" else residual), (res if kind == "affine" else None), relu, grad


@pytest.mark.parametrize("fmt", cases.FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TYPES, ids=["fp32", "fp16", "bf16"])
def test_exact(library, dtype, fmt):
    for shape in SHAPES:
        for y, main, residual, res, relu, grad in problems(shape, dtype, fmt):
            out = run(library, y, main, residual, res, relu)
            assert torch.equal(out, cases.forward(y, main, residual, res, relu)), shape
            expected = cases.backward(grad, y, main, residual, res, relu)
            expected.pop("grad_res_shift", None)  # the tensor side copies grad_shift
            grads = run(library, y, main, residual, res, relu, grad)
            assert grads.keys() == expected.keys()
            for name, want in expected.items():
                assert torch.equal(grads[name], want), (shape, name)


def test_both_access_widths_are_covered(library):
    def width(shape, dtype, fmt):
        planes = fmt == torch.contiguous_format
        p = Problem(TYPES[dtype], planes, True, 0, shape[0], shape[1], shape[2] * shape[3])
        return library.vector_length(ctypes.byref(p)), library.parts(ctypes.byref(p))

    seen = {(dtype, fmt, *width(s, dtype, fmt)) for s in SHAPES for dtype in TYPES for fmt in cases.FORMATS}
    for dtype, fmt in itertools.product(TYPES, cases.FORMATS):
        widths = {(v, parts > s) for d, f, v, parts in seen if (d, f) == (dtype, fmt) for s in (1,)}
        assert {v for v, _ in widths} == {1, 4 if dtype == torch.float32 else 8}
        assert True in {many for _, many in widths}


@pytest.mark.parametrize("fmt", cases.FORMATS, ids=["contiguous", "channels_last"])
def test_unaligned_output_takes_the_narrow_path(library, fmt):
    for y, main, residual, res, relu, grad in problems((2, 16, 4, 8), torch.bfloat16, fmt):
        assert torch.equal(
            run(library, y, main, residual, res, relu, offset=3), cases.forward(y, main, residual, res, relu)
        )
        grads = run(library, y, main, residual, res, relu, grad, offset=1)
        expected = cases.backward(grad, y, main, residual, res, relu)
        assert all(torch.equal(grads[name], expected[name]) for name in grads)


def test_order_of_threads_does_not_matter(library):
    g = torch.Generator().manual_seed(1)
    y, residual, grad = (torch.randn(2, 24, 40, 40, generator=g) for _ in range(3))
    main, res = (tuple(torch.randn(24, generator=g) for _ in range(3)) for _ in range(2))
    for fmt in cases.FORMATS:
        args = [t.contiguous(memory_format=fmt) for t in (y, residual, grad)]
        one, two = (run(library, args[0], main, args[1], res, True, args[2], order=order) for order in (0, 1))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_nan_and_infinity(library):
    g = torch.Generator().manual_seed(2)
    for dtype in TYPES:
        y = cases.exact((2, 8, 4, 4), g, dtype=dtype)
        y[0, 1, 0, 0], y[1, 2, 3, 3], y[1, 3, 0, 1] = float("nan"), float("inf"), -float("inf")
        main = (torch.ones(8), torch.zeros(8), torch.zeros(8))
        out = run(library, y, main, None, None, True)
        assert (
            out.isnan().sum() == 1
            and out[0, 1, 0, 0].isnan()
            and out[1, 2, 3, 3] == float("inf")
            and out[1, 3, 0, 1] == 0
        )
        grads = run(library, y, main, None, None, True, torch.ones_like(y))
        assert grads["grad_y"][0, 1, 0, 0] == 0 and grads["grad_y"].isfinite().all()
