"""The CUDA kernels of scale_shift_act without a GPU: as fibers and as the PTX that nvcc emits, against float64 formulas."""

import itertools
import re

import native_cases as cases
import pytest
import torch
from emulation import cuda
from emulation.cuda_problems import RESIDUALS, TYPES, Affine, PointProblem, check, pointer
from emulation.errors import SharedMemoryRace
from emulation.sanitized import Sanitized
from parity import assert_parity
from triton_cases import POINTS

from fastres.kernels.scale_shift_act import reference

FORMATS = pytest.mark.parametrize("fmt", cases.FORMATS, ids=["contiguous", "channels_last"])
DTYPES = pytest.mark.parametrize("dtype", TYPES, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(scope="module")
def library():
    found = cuda.build("scale_shift_act.cpp")
    check(found, "problem_size", PointProblem)
    return found


@pytest.fixture(scope="module")
def ptx():
    return cuda.ptx("scale_shift_act.cu")


def filled(like, offset=0):
    """Like ``like``, all NaN (what a kernel forgets to write stays visible), ``offset`` elements off alignment."""
    room = torch.full((like.numel() + offset,), float("nan"), dtype=like.dtype)
    return torch.as_strided(room, like.shape, like.stride(), offset)


def run(library, y, main, residual, res, relu, grad=None, want_residual=True, offset=0, executor=None, masked=False):
    """Forward (grad None) or backward: the output, or the gradients by name."""
    executor = executor or cuda.Fibers()
    kind = "affine" if res is not None else "plain" if residual is not None else "none"
    n, c, h, w = y.shape
    p = PointProblem(
        TYPES[y.dtype], y.is_contiguous(), relu, RESIDUALS[kind], n, c, h * w, Affine.of(main), Affine.of(res)
    )
    p.y, p.residual, p.grad = map(pointer, (y, residual, grad))
    inputs = {"y": y, **dict(zip(("scale", "center", "shift"), main, strict=True))}
    inputs |= {} if residual is None else {"residual": residual}
    inputs |= {} if res is None else dict(zip(("res_scale", "res_center", "res_shift"), res, strict=True))
    if grad is None:
        out = filled(y, offset)
        p.out = pointer(out)
        library.run("forward", p, executor, {**inputs, "out": out})
        return out
    grads = {"grad_y": filled(y, offset)}
    p.grad_y = pointer(grads["grad_y"])
    if not masked and (kind == "affine" or (kind == "plain" and relu and want_residual)):
        grads["grad_residual"] = filled(y)
        p.grad_residual = pointer(grads["grad_residual"])
    partial = torch.full((library.call("partial_size", p),), float("nan"))
    p.partial = pointer(partial)
    for i, name in enumerate(("grad_scale", "grad_shift", "grad_res_scale")[: 3 if kind == "affine" else 2]):
        grads[name] = torch.full((c,), float("nan"))
        p.sum_out[i] = pointer(grads[name])
    function = "masked" if masked else "backward"
    library.run(function, p, executor, {**inputs, **grads, "grad": grad, "partial": partial})
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


def problems(shape, dtype, fmt, kinds=tuple(RESIDUALS)):
    g = torch.Generator().manual_seed(0)
    y, residual = (cases.exact(shape, g, dtype=dtype, fmt=fmt) for _ in range(2))
    grad = cases.exact(shape, g, -4, 4, 1.0, dtype=dtype, fmt=fmt)
    main, res = (cases.coefficients(shape[1], g) for _ in range(2))
    for kind, relu in itertools.product(kinds, (True, False)):
        yield y, main, (None if kind == "none" else residual), (res if kind == "affine" else None), relu, grad


def expected_grads(grad, y, main, residual, res, relu):
    expected = cases.backward(grad, y, main, residual, res, relu)
    expected.pop("grad_res_shift", None)  # the tensor side copies grad_shift
    return expected


def assert_equal(ours, expected, note=""):
    assert ours.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(ours[name], want), (note, name)


@FORMATS
@DTYPES
def test_exact(library, dtype, fmt):
    schedules = itertools.cycle(cuda.fibers())
    for shape in SHAPES:
        for problem in problems(shape, dtype, fmt):
            out = run(library, *problem[:-1], executor=next(schedules))
            assert torch.equal(out, cases.forward(*problem[:-1])), shape
            expected = expected_grads(problem[-1], *problem[:-1])
            assert_equal(run(library, *problem, executor=next(schedules)), expected, shape)


MATRIX = [shape for shape in POINTS if shape[0]]  # an empty map has no launch


@pytest.mark.parametrize("index", range(len(MATRIX)), ids=[str(shape) for shape in MATRIX])
def test_the_shapes_of_the_triton_kernels(library, ptx, index):
    """Whole numbers bit for bit, then random ones by the rule; every kind of residual, every schedule, and nvcc's PTX."""
    shape, fmt = MATRIX[index], cases.FORMATS[index % 2]
    executors = (*cuda.fibers(), cuda.Ptx(ptx))
    for n, problem in enumerate(problems(shape, tuple(TYPES)[index % 3], fmt)):
        executor = executors[(index + n) % 5]
        assert torch.equal(run(library, *problem[:-1], executor=executor), cases.forward(*problem[:-1]))
        assert_equal(run(library, *problem, executor=executor), expected_grads(problem[-1], *problem[:-1]))
    dtype, names = (
        tuple(TYPES)[(index + 1) % 3],
        ("grad_y", "grad_scale", "grad_shift", "grad_residual", "grad_res_scale"),
    )
    g = torch.Generator().manual_seed(index)
    y, residual, grad = (torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=fmt) for _ in range(3))
    main, res = (tuple(torch.randn(shape[1], generator=g) for _ in range(3)) for _ in range(2))
    executor, given = executors[(index + 2) % 5], (y, *main, residual, *res)
    wide = [t.double() for t in given]
    out = run(library, y, main, residual, res, True, executor=executor)
    assert_parity(out, reference.forward(*given, True), reference.forward(*wide, True), "out")
    ours = run(library, y, main, residual, res, True, grad, executor=executor)
    peer, truth = reference.backward(grad, *given, True, True), reference.backward(grad.double(), *wide, True, True)
    for name, other, true in zip(names, peer, truth, strict=False):
        assert_parity(ours[name], other, true, name)


@DTYPES
def test_masked_gradient(library, dtype):
    """dz in place of its multiples: as the backward with scales of one."""
    for fmt in cases.FORMATS:
        for y, main, residual, res, relu, grad in problems((2, 17, 6, 5), dtype, fmt):
            ours = run(library, y, main, residual, res, relu, grad, masked=True, executor=cuda.Fibers(3))
            expected = expected_grads(grad, y, main, residual, res, relu)
            expected["grad_y"] = (
                torch.where(cases.forward(y, main, residual, res, False) > 0, grad, 0) if relu else grad
            )
            expected.pop("grad_residual", None)
            assert_equal(ours, expected)


def test_both_access_widths_are_covered(library):
    def width(shape, dtype, fmt):
        planes = fmt == torch.contiguous_format
        p = PointProblem(TYPES[dtype], planes, True, 0, shape[0], shape[1], shape[2] * shape[3])
        return library.call("width", p), library.call("parts", p)

    seen = {(dtype, fmt, *width(s, dtype, fmt)) for s in SHAPES for dtype in TYPES for fmt in cases.FORMATS}
    for dtype, fmt in itertools.product(TYPES, cases.FORMATS):
        widths = {(v, parts > 1) for d, f, v, parts in seen if (d, f) == (dtype, fmt)}
        assert {v for v, _ in widths} == {1, 4 if dtype == torch.float32 else 8}
        assert True in {many for _, many in widths}


@FORMATS
def test_unaligned_output_takes_the_narrow_path(library, fmt):
    for problem in problems((2, 16, 4, 8), torch.bfloat16, fmt):
        assert torch.equal(run(library, *problem[:-1], offset=3), cases.forward(*problem[:-1]))
        assert_equal(run(library, *problem, offset=1), expected_grads(problem[-1], *problem[:-1]))


def test_order_of_threads_does_not_matter(library):
    g = torch.Generator().manual_seed(1)
    y, residual, grad = (torch.randn(2, 24, 40, 40, generator=g) for _ in range(3))
    main, res = (tuple(torch.randn(24, generator=g) for _ in range(3)) for _ in range(2))
    for fmt in cases.FORMATS:
        args = [t.contiguous(memory_format=fmt) for t in (y, residual, grad)]
        first, *others = (
            run(library, args[0], main, args[1], res, True, args[2], executor=executor) for executor in cuda.fibers()
        )
        for other in others:
            assert_equal(other, first)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitized(library, sanitizer):
    """No races, nothing outside of the tensors or shared memory, and the same numbers."""
    for fmt, dtype in itertools.product(cases.FORMATS, (torch.float32, torch.bfloat16)):
        problem = next(problems((2, 17, 6, 5), dtype, fmt, ("affine",)))
        executor = Sanitized(sanitizer)
        assert torch.equal(run(library, *problem[:-1], executor=executor), cases.forward(*problem[:-1]))
        assert_equal(run(library, *problem, executor=executor), expected_grads(problem[-1], *problem[:-1]))


def test_nan_and_infinity(library):
    g = torch.Generator().manual_seed(2)
    for dtype in TYPES:
        y = cases.exact((2, 8, 4, 4), g, dtype=dtype)
        y[0, 1, 0, 0], y[1, 2, 3, 3], y[1, 3, 0, 1] = float("nan"), float("inf"), -float("inf")
        main = (torch.ones(8), torch.zeros(8), torch.zeros(8))
        out = run(library, y, main, None, None, True)
        assert out.isnan().sum() == 1 and out[0, 1, 0, 0].isnan()
        assert out[1, 2, 3, 3] == float("inf") and out[1, 3, 0, 1] == 0
        grads = run(library, y, main, None, None, True, torch.ones_like(y))
        assert grads["grad_y"][0, 1, 0, 0] == 0 and grads["grad_y"].isfinite().all()


# ---- The PTX that nvcc emits: the compiler's own loads, conversions and barriers


def test_ptx(library, ptx):
    last, planes = torch.channels_last, torch.contiguous_format
    for shape, dtype, fmt, kind in (
        ((2, 24, 5, 7), torch.bfloat16, last, "affine"),
        ((2, 3, 5, 8), torch.half, planes, "plain"),
    ):
        problem = next(problems(shape, dtype, fmt, (kind,)))
        out = run(library, *problem[:-1], executor=cuda.Ptx(ptx))
        assert torch.equal(out, cases.forward(*problem[:-1]))
    for shape, dtype, fmt, kind, masked in (
        ((2, 24, 5, 7), torch.half, last, "affine", False),
        ((2, 5, 5, 7), torch.bfloat16, last, "plain", True),
        ((2, 3, 5, 8), torch.float32, planes, "affine", False),
    ):
        problem = next(problems(shape, dtype, fmt, (kind,)))
        ours = run(library, *problem, executor=cuda.Ptx(ptx), masked=masked)
        assert_equal(ours, run(library, *problem, masked=masked))


def test_a_removed_barrier_is_a_race(library, ptx):
    entries = [*re.finditer(r"\.entry (\w+)", ptx)]
    ends = [m.start() for m in entries[1:]] + [len(ptx)]
    problem = next(problems((2, 24, 5, 7), torch.half, torch.channels_last, ("affine",)))
    found = 0
    for entry, end in zip(entries, ends, strict=True):
        if not re.search("backward_rowsINS0_4HalfELi8ELNS0_8ResidualE2ELb0E|add_partsILi3E", entry[1]):
            continue
        for barrier in re.finditer(r"bar(rier)?\.(cta\.)?sync[^;]*;", ptx[entry.start() : end]):
            text = ptx[: entry.start() + barrier.start()] + ptx[entry.start() + barrier.end() :]
            with pytest.raises(SharedMemoryRace):
                run(library, *problem, executor=cuda.Ptx(text))
            found += 1
    assert found == 2
