"""The pointwise ops by Triton's kernels: as source under Triton's interpreter, and as the PTX that is compiled for sm_80."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS, random_map, random_vectors
from emulation.compiling import compile_launch
from emulation.errors import EmulationError
from emulation.ptx import ptx_executor
from emulation.triton_interpreter import interpreter_executor
from parity import assert_parity
from test_ops import call, compare
from torch._subclasses import FakeTensorMode
from triton_cases import DTYPES, MEANS, POINTS, POOLS, whole_numbers, whole_vectors

from fastres.kernels.common import triton_sums
from fastres.kernels.common.triton_launch import Config, Launch, executing_with
from fastres.kernels.conv_stats import reference as stats_reference
from fastres.kernels.conv_stats import triton_stats
from fastres.kernels.scale_shift_act import triton_backend as point_backend
from fastres.kernels.scale_shift_act import triton_kernel as point_kernel
from fastres.kernels.scale_shift_act_mean import triton_backend as mean_backend
from fastres.kernels.scale_shift_act_mean import triton_kernel as mean_kernel
from fastres.kernels.scale_shift_act_pool import triton_backend as pool_backend
from fastres.kernels.scale_shift_act_pool import triton_kernel as pool_kernel

EXECUTORS = {"source": interpreter_executor, "ptx": ptx_executor}
executors = pytest.mark.parametrize("executor", EXECUTORS)
# Many programs, several tiles each, several columns of tiles: what large maps are cut into.
SMALL = Config.of(ELEMENTS=128, WIDTH=16, PROGRAMS=6)
SMALL_MEAN = Config.of(BLOCK_M=8, WIDTH=16)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Whatever a kernel should have written and did not is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def variants(index: int) -> tuple[int, bool, str]:
    """(residual: none, plain or with coefficients; whether there is a ReLU; layout) of a case: all of them, in turn."""
    return index % 3, index % 2 == 0, LAYOUTS[(index // 3) % 4]


def dtypes_of(executor: str, index: int) -> tuple[torch.dtype, ...]:
    """All under the interpreter; compiling takes longer, so one each for PTX."""
    return DTYPES if executor == "source" else (DTYPES[(index // 2) % 3],)


def exact_and_equal(op, tensors, kwargs):
    """Outputs and gradients equal the definition in float64, rounded once, bit for bit."""
    results = []
    for backend, dtype in (("triton", None), ("reference", torch.float64)):
        inputs = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        out = call(op, backend, *inputs, **kwargs)
        up = whole_numbers(tuple(out.shape), torch.float64, "contiguous", 11, largest=2).to(out.dtype)
        wanted = [t for i, t in enumerate(inputs) if t is not None and i not in (2, 6)]  # centers have no gradient
        results.append((out, *torch.autograd.grad(out, wanted, up)))
    for i, (ours, truth) in enumerate(zip(*results, strict=True)):
        truth = truth.to(ours.dtype)
        assert torch.equal(ours, truth), f"result {i}: {int((ours != truth).sum())} differ"


def point_tensors(shape, dtype, residual, layout, maps, vectors):
    y, rest = maps(shape, dtype, layout, 1), maps(shape, dtype, layout, 2)
    extra = ((None,) * 4, (rest, None, None, None), (rest, *vectors(shape[1], 4)))[residual]
    return (y, *vectors(shape[1], 3), *extra)


def normal_vectors(channels, seed):
    return random_vectors(channels, 3, seed=seed)


@executors
@pytest.mark.parametrize("op", ["scale_shift_act", "scale_shift_act_mean"])
@pytest.mark.parametrize("index", range(len(MEANS)))
def test_point(index, op, executor):
    """Whole numbers bit for bit, random ones by the rule."""
    shape = (POINTS if op == "scale_shift_act" else MEANS)[index]
    residual, relu, layout = variants(index)
    with executing_with(EXECUTORS[executor]()):
        for dtype in dtypes_of(executor, index):
            tensors = point_tensors(shape, dtype, residual, layout, whole_numbers, whole_vectors)
            exact_and_equal(op, tensors, {"relu": relu})
            other = POINTS[index] if executor == "source" else shape
            tensors = point_tensors(other, dtype, residual, layout, random_map, normal_vectors)
            compare(op, "triton", tensors, {"relu": relu})


@executors
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool(case, executor):
    """Whole numbers have many ties: the first maximum wins, as in PyTorch."""
    index = POOLS.index(case)
    _, relu, layout = variants(index)
    kwargs = {"relu": relu, **case.window}
    with executing_with(EXECUTORS[executor]()):
        for dtype in dtypes_of(executor, index):
            y, vectors = whole_numbers(case.shape, dtype, layout, 1), whole_vectors(case.c, 3)
            exact_and_equal("scale_shift_act_pool", (y, *vectors), kwargs)
            args = (relu, *case[4:])
            expected = torch.ops.fastres.scale_shift_act_pool_reference(y, *vectors, *args)
            out, places = torch.ops.fastres.scale_shift_act_pool_triton(y, *vectors, *args)
            assert torch.equal(out, expected[0]) and torch.equal(places, expected[1])
            again = torch.ops.fastres.scale_shift_act_pool_gather_triton(y, *vectors, places, *args)
            assert torch.equal(again, out)
            y = random_map(case.shape, dtype, layout)
            compare("scale_shift_act_pool", "triton", (y, *normal_vectors(case.c, 3)), kwargs)


def exact_statistics(y):
    wide = y.double()
    return wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)


@executors
@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("index", range(len(POINTS)))
def test_statistics(index, executor):
    layout = variants(index)[2]
    with executing_with(EXECUTORS[executor]()):
        for dtype in dtypes_of(executor, index):
            y, grad = random_map(POINTS[index], dtype, layout), random_map(POINTS[index], dtype, layout, seed=5)
            truth = exact_statistics(y)
            peer = torch.var_mean(y.float(), (0, 2, 3), correction=0)[::-1]
            for ours, other, exact in zip(triton_stats.stats(y), peer, truth, strict=True):
                assert_parity(ours, other, exact)
            g_mean, g_var = random_vectors(y.shape[1], 2)
            mean = torch.zeros(y.shape[1]) if not y.numel() else truth[0].float()
            left_out = (index % 3 == 0, False, False, index % 4 == 1, index % 4 == 2)
            given = [None if out else t for t, out in zip((grad, y, mean, g_mean, g_var), left_out, strict=True)]
            exact = stats_reference.stats_backward(*(None if t is None else t.double() for t in given))
            ours = triton_stats.stats_backward(*given)
            assert_parity(ours, stats_reference.stats_backward(*given), exact)


@executors
def test_statistics_where_the_mean_is_large(executor):
    """Σy² − n·mean² would have no digit left here."""
    y = torch.randn(2, 18, 9, 8).mul(1e-2).add(1000.0)
    with executing_with(EXECUTORS[executor]()):
        for config in (SMALL, triton_stats.STATS_CONFIGS[0]):
            mean, var = triton_stats.stats(y, config)
            exact = exact_statistics(y)
            assert torch.allclose(mean.double(), exact[0], rtol=1e-6) and torch.allclose(
                var.double(), exact[1], rtol=1e-3
            )
            constant, nothing = triton_stats.stats(torch.full((2, 3, 5, 4), 7.0), config)
            assert torch.equal(constant, torch.full((3,), 7.0)) and not nothing.any()


def configured(monkeypatch, forward, backward, mean):
    for module in (point_backend, pool_backend):
        monkeypatch.setattr(module, "FORWARD_CONFIGS", (forward,))
        monkeypatch.setattr(module, "BACKWARD_CONFIGS", (backward,))
    monkeypatch.setattr(mean_backend, "FORWARD_CONFIGS", (mean,))


def all_ops(dtype, shape=(3, 40, 9, 7)):
    tensors = point_tensors(shape, dtype, 2, "channels_last", random_map, normal_vectors)
    for op in ("scale_shift_act", "scale_shift_act_mean"):
        compare(op, "triton", tensors, {"relu": True})
    compare("scale_shift_act_pool", "triton", tensors[:4], {})


@executors
def test_maps_cut_into_many_programs(executor, monkeypatch):
    configured(monkeypatch, SMALL, SMALL, SMALL_MEAN)
    grids = {}
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (grids.update({launch.kernel: launch}), run(launch)))
    with executing_with(EXECUTORS[executor]()):
        all_ops(torch.bfloat16)
        y = random_map((3, 40, 9, 7), torch.float32)
        for ours, exact in zip(triton_stats.stats(y, SMALL), exact_statistics(y), strict=True):
            assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-6)
    for launch in grids.values():
        if "steps" in launch.arguments:
            assert launch.arguments["steps"] > 1 and launch.grid[0] > 3
    assert len(grids) == 8


@pytest.mark.parametrize("number", range(4))
def test_every_configuration(number, monkeypatch):
    """The shipped ones, the default first: all give the same."""

    def pick(configs):
        return configs[number % len(configs)]

    point = (pick(point_kernel.FORWARD_CONFIGS), pick(point_kernel.BACKWARD_CONFIGS))
    configured(monkeypatch, *point, pick(mean_kernel.FORWARD_CONFIGS))
    monkeypatch.setattr(pool_backend, "FORWARD_CONFIGS", (pick(pool_kernel.FORWARD_CONFIGS),))
    monkeypatch.setattr(pool_backend, "BACKWARD_CONFIGS", (pick(pool_kernel.BACKWARD_CONFIGS),))
    with executing_with(interpreter_executor()):
        all_ops(torch.float16, (2, 130, 5, 7))


@executors
def test_not_a_number(executor):
    """It passes the ReLU, wins in a pool (the last one), and is in its channel's sums and in no other."""
    y = whole_numbers((2, 8, 6, 6), torch.float32, "channels_last", 1)
    y[1, 3, 2, 2] = y[1, 3, 2, 3] = float("nan")
    vectors = whole_vectors(8, 3)
    grad = whole_numbers((2, 8, 6, 6), torch.float32, "channels_last", 2)
    with executing_with(EXECUTORS[executor]()):
        out = call("scale_shift_act", "triton", y, *vectors)
        assert torch.equal(out.isnan(), y.isnan())
        pooled = torch.ops.fastres.scale_shift_act_pool_triton(y, *vectors, True, 3, 2, 1)
        expected = torch.ops.fastres.scale_shift_act_pool_reference(y, *vectors, True, 3, 2, 1)
        assert all(torch.equal(a.nan_to_num(99), b.nan_to_num(99)) for a, b in zip(pooled, expected, strict=True))
        ours = torch.ops.fastres.scale_shift_act_backward_triton(grad, y, *vectors, *[None] * 4, True, False)
        exact = torch.ops.fastres.scale_shift_act_backward_reference(grad, y, *vectors, *[None] * 4, True, False)
        assert all(torch.equal(a.nan_to_num(99), b.nan_to_num(99)) for a, b in zip(ours, exact, strict=True))
        assert call("scale_shift_act_mean", "triton", y, *vectors).isnan().sum() == 1


@executors
def test_minus_infinity_everywhere(executor):
    """A pool without a ReLU chooses the first place inside the map."""
    y = torch.full((1, 2, 3, 3), float("-inf")).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(2), torch.zeros(2)
    with executing_with(EXECUTORS[executor]()):
        ours = torch.ops.fastres.scale_shift_act_pool_triton(y, one, zero, zero, False, 3, 2, 1)
    expected = torch.ops.fastres.scale_shift_act_pool_reference(y, one, zero, zero, False, 3, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_place_outside_the_map():
    y, vectors = whole_numbers((1, 4, 5, 5), torch.float32, "channels_last", 1), whole_vectors(4, 3)
    args = (True, 3, 2, 1)
    with executing_with(interpreter_executor()):
        out, index = torch.ops.fastres.scale_shift_act_pool_triton(y, *vectors, *args)
        index[0, 0, 0, 0] = 0  # above the map
        index[0, 1, 2, 2] = 255
        again = torch.ops.fastres.scale_shift_act_pool_gather_triton(y, *vectors, index, *args)
        assert again[0, 0, 0, 0].isnan() and again[0, 1, 2, 2].isnan() and again.isnan().sum() == 2
        grads = torch.ops.fastres.scale_shift_act_pool_backward_triton(torch.ones_like(out), index, y, *vectors, *args)
        assert all(g.isfinite().all() for g in grads)


@executors
def test_sums_are_the_same_bits_at_every_run(executor):
    shape = (2, 40, 9, 7)
    tensors = point_tensors(shape, torch.bfloat16, 2, "channels_last", random_map, normal_vectors)
    runs = []
    with executing_with(EXECUTORS[executor]()):
        for _ in range(2):
            runs.append(torch.ops.fastres.scale_shift_act_backward_triton(tensors[0], *tensors, True, True))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_vectors_of_any_kind():
    """Narrow, wide and expanded vectors count as float32 ones."""
    y = random_map((2, 6, 4, 5), torch.bfloat16)
    one = torch.ones((), dtype=torch.float64)
    vectors = (one.expand(6), torch.zeros(6, dtype=torch.bfloat16), torch.arange(12.0)[::2])
    plain = [v.float().contiguous() for v in vectors]
    with executing_with(interpreter_executor()):
        assert torch.equal(call("scale_shift_act", "triton", y, *vectors), call("scale_shift_act", "triton", y, *plain))


HUGE = (2**12, 1024, 32, 32)  # 2³² elements


def huge_launches():
    """Launches on maps that no memory holds."""
    launches = []
    with FakeTensorMode(), executing_with(launches.append):
        y = torch.empty(HUGE, dtype=torch.float16, device="cuda").contiguous(memory_format=torch.channels_last)
        vectors = [torch.empty(HUGE[1], device="cuda") for _ in range(3)]
        point_backend.forward(y, *vectors, y, *vectors, True)
        point_backend.backward(y, y, *vectors, y, *vectors, True, True)
        mean_backend.backward(
            mean_backend.forward(y, *vectors, y, *vectors, True), y, *vectors, y, *vectors, True, True
        )
        out, index = pool_backend.forward(y, *vectors, True, 3, 2, 1)
        pool_backend.gather(y, *vectors, index, True, 3, 2, 1)
        pool_backend.backward(out, index, y, *vectors, True, 3, 2, 1)
        triton_stats.stats_backward(y, y, vectors[0], *triton_stats.stats(y))
    return launches


def test_offsets_of_huge_maps():
    """Everything that reads or writes a map of 2³¹ elements or more computes its offsets in 64 bits, and compiles."""
    launches = huge_launches()
    wide = [launch for launch in launches if "INT64" in launch.constants]
    assert len(wide) == 9 and all(launch.constants["INT64"] for launch in wide)
    for launch in wide:
        ptx = compile_launch(launch, 80).asm["ptx"]
        assert ".local" not in ptx, f"{launch.name} spills"


def test_width_of_offsets():
    rows, channels = 2**31 // 16 + 64, 16
    problem = point_kernel.PointProblem(rows, channels, 1)
    assert problem.constants["INT64"] and not point_kernel.PointProblem(2**20, channels, 1).constants["INT64"]
    assert not point_kernel.PointProblem(2**31 // 16 - 2**17, channels, 1).constants["INT64"]


# (kernel's module, backend's module, launcher, op, what is right, what is wrong)
POINT = (point_kernel, point_backend)
POOL = (pool_kernel, pool_backend)
MISTAKES = (
    (*POINT, "forward_launch", "(rows < M)[:, None]", "(rows <= M)[:, None]"),
    (*POINT, "forward_launch", "tl.where(z <= 0.0, 0.0, z)", "tl.where(z <= 1.0, 0.0, z)"),
    (*POINT, "forward_launch", "(y + at, mask), a, mid, b)", "(y + at, mask), a, b, mid)"),
    (*POINT, "backward_launch", "dz = tl.where(z > 0.0, dz, 0.0)", "dz = tl.where(z >= 0.0, dz, 0.0)"),
    (*POINT, "backward_launch", "dot += dz * (value.to(tl.float32) - mid)", "dot += dz * value.to(tl.float32)"),
    (*POINT, "backward_launch", "total += dz", "total = dz"),
    (*POOL, "forward_launch", "(value > best)", "(value >= best)"),
    (*POOL, "backward_launch", "(kh < KERNEL) & (kw < KERNEL)", "(kh < KERNEL)"),
    (*POOL, "backward_launch", "inside(p, q, P, Q)", "(p >= 0) & (q >= 0)"),
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=[f"{m[2]}: {m[4]}" for m in MISTAKES])
def test_a_broken_kernel_is_noticed(mistake, tmp_path, monkeypatch):
    kernel, backend, launcher, old, new = mistake
    configured(monkeypatch, SMALL, SMALL, SMALL_MEAN)
    monkeypatch.setattr(backend, launcher, getattr(planted(kernel, old, new, tmp_path), launcher))
    tensors = point_tensors((1, 17, 10, 10), torch.float32, 1, "channels_last", whole_numbers, whole_vectors)
    with executing_with(interpreter_executor()), pytest.raises((AssertionError, EmulationError)):
        if kernel is point_kernel:
            exact_and_equal("scale_shift_act", tensors, {"relu": True})
        else:
            exact_and_equal("scale_shift_act_pool", tensors[:4], {"relu": True})


def planted(module, old, new, folder):
    """A copy of a kernel's module with ``new`` in the place of ``old``."""
    source = Path(module.__file__).read_text()
    assert old in source
    path = folder / "broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.broken", path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize("rows", [1, 7, 128, 129, 1000, 100_000])
@pytest.mark.parametrize("channels", [1, 3, 64, 300])
def test_cut_into_tiles(rows, channels):
    """Every row and column belongs to one program; there are about as many programs as asked for."""
    for config in (*point_kernel.BACKWARD_CONFIGS, SMALL):
        tiles = triton_sums.Tiles.of(rows, channels, config, config["PROGRAMS"])
        assert (tiles.parts - 1) * tiles.steps * tiles.BLOCK_M < rows <= tiles.parts * tiles.steps * tiles.BLOCK_M
        assert (tiles.columns - 1) * tiles.BLOCK_C < channels <= tiles.columns * tiles.BLOCK_C
        assert tiles.grid[0] <= max(config["PROGRAMS"] + tiles.columns, tiles.columns)
