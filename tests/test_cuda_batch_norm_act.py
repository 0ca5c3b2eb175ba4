"""The CUDA kernels of batch_norm_act without a GPU: as fibers and as nvcc's PTX, all blocks of a launch at once."""

import itertools
import re

import pytest
import torch
from emulation import cuda
from emulation.cuda_problems import TYPES, Chip, Norm, check, pointer
from emulation.errors import EmulationError, Hang, SharedMemoryRace
from emulation.memory import GuardedMemory
from emulation.ptx import run_ptx
from emulation.sanitized import Sanitized
from parity import assert_parity
from torch import Tensor
from triton_cases import POINTS

from fastres.kernels.batch_norm_act import bytes as formula
from fastres.kernels.batch_norm_act import reference

# Blocks enough for parts of the rows and groups of the channels; small, since every thread of every block is a fiber.
SIZES = (64 << 10, 63 << 10)
SMALL, ONE = Chip(2, *SIZES), Chip(1, 400 << 10, 199 << 10)
DTYPES = tuple(TYPES)
SHAPES = tuple(shape for shape in POINTS if shape[0])
LARGER = ((2, 16, 40, 40), (3, 12, 27, 31))  # a part of them lies in shared memory
FIBERS = cuda.fibers()


@pytest.fixture(scope="module")
def library():
    found = cuda.build("batch_norm_act.cpp")
    check(found, "problem_size", Norm)
    return found


@pytest.fixture(scope="module")
def ptx():
    return cuda.ptx(cuda.ROOT / "csrc" / "cuda" / "batch_norm_act.cu")


def lay(t: Tensor, offset: int = 0) -> Tensor:
    """[N, C, H, W] -> its rows [N·H·W, C], dense, ``offset`` elements off alignment."""
    rows = t.movedim(1, 3).reshape(-1, t.shape[1])
    room = torch.full((rows.numel() + offset + 8,), float("nan"), dtype=t.dtype)
    start = (-room.data_ptr() // room.itemsize) % (16 // room.itemsize) + offset
    return room[start : start + rows.numel()].view(rows.shape).copy_(rows)


def blank(like: Tensor, offset: int = 0) -> Tensor:
    return lay(torch.full((1, like.shape[1], like.shape[0], 1), float("nan"), dtype=like.dtype), offset)


class Run:
    """Forward and backward of one problem on a chip; maps are rows [R, C]."""

    def __init__(self, library, y, weight, bias, residual=None, relu=True, eps=1e-5, chip=SMALL, offset=0):
        self.library, self.chip, self.relu, self.eps, self.offset = library, chip, relu, eps, offset
        self.tensors = {"y": lay(y, offset), "weight": weight, "bias": bias}
        if residual is not None:
            self.tensors["residual"] = lay(residual)
        self.rows, self.channels = self.tensors["y"].shape
        self.arrived = torch.zeros(1024, dtype=torch.int32)  # one for all launches: none resets it

    def problem(self, backward: bool, tensors: dict[str, Tensor]) -> Norm:
        p = Norm(TYPES[tensors["y"].dtype], self.relu, self.eps, self.rows, self.channels)
        for name, t in tensors.items():
            setattr(p, name, pointer(t))
        reason = self.library.call("make_plan", self.chip, int(backward), p, result=cuda.ctypes.c_char_p)
        assert reason is None, reason
        return p

    def launch(
        self, function: str, executor, results: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = {**self.tensors, **inputs, **results, "arrived": self.arrived}
        p = self.problem(function == "backward", tensors)
        partial = torch.full((p.plan.parts * 2 * self.channels,), float("nan"))
        p.partial, tensors["partial"] = partial.data_ptr(), partial
        self.plan = p.plan
        self.library.run(function, p, executor, tensors)
        assert not (self.arrived[: p.plan.groups] & 0x7FFFFFFF).any(), "a barrier that not all blocks left"
        return results

    def vectors(self, *names: str) -> dict[str, Tensor]:
        return {name: torch.full((self.channels,), float("nan")) for name in names}

    def forward(self, executor) -> dict[str, Tensor]:
        results = {"out": blank(self.tensors["y"], self.offset), **self.vectors("mean", "var")}
        return self.launch("forward", executor, results, {})

    def backward(self, executor, grad: Tensor, mean: Tensor, var: Tensor, keep=True) -> dict[str, Tensor]:
        y = self.tensors["y"]
        results = {"grad_y": blank(y, self.offset), **self.vectors("grad_weight", "grad_bias")}
        if keep and "residual" in self.tensors:
            results["grad_residual"] = blank(y)
        return self.launch("backward", executor, results, {"grad": lay(grad), "mean": mean, "var": var})


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fmaf: float64 holds the product exactly."""
    return (a.double() * b.double() + c.double()).float()


def inverse(var: Tensor, eps: float) -> Tensor:
    """1 / √(var + eps), each step rounded correctly to float32: PyTorch's own square root isn't on every CPU."""
    root = (var + torch.tensor(eps)).double().sqrt().float()
    return (1 / root.double()).float()


def pre_activation(run: Run, mean: Tensor, var: Tensor) -> Tensor:
    """z in the kernels' own float32 instructions."""
    t = run.tensors
    z = fused(t["weight"] * inverse(var, run.eps), t["y"].float() - mean, t["bias"])
    return z + t["residual"].float() if "residual" in t else z


def assert_applied(run: Run, found: dict[str, Tensor]) -> None:
    """The result is, bit for bit, what the statistics that the kernel found make of y."""
    z = pre_activation(run, found["mean"], found["var"])
    assert torch.equal(found["out"], (z.relu() if run.relu else z).to(found["out"].dtype))


def whole(shape, dtype, seed, low=-4, high=4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=g).to(dtype)


def normal(shape, dtype, seed, mean=0.0, deviation=1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (mean + deviation * torch.randn(shape, generator=g)).to(dtype)


def executors(ptx: str, number: int) -> list:
    """Every schedule of fibers, and for every fourth shape the PTX."""
    return [*FIBERS, *([cuda.Ptx(ptx, early=number % 8 == 0)] if number % 4 == 0 else [])]


def cases():
    for number, shape in enumerate((*SHAPES, *LARGER)):
        dtype = DTYPES[number % 3]
        # Every group of channels needs a block of its own.
        chip = ONE if shape in LARGER else Chip(max(2, shape[1] // 32), *SIZES)
        yield pytest.param(
            number, shape, dtype, chip, id=f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}"
        )


@pytest.mark.parametrize("number, shape, dtype, chip", list(cases()))
def test_forward(library, ptx, number, shape, dtype, chip):
    """Statistics by the rule, exact where the cut of the rows keeps every mean exact; the rest bit for bit."""
    c, rows = shape[1], shape[0] * shape[2] * shape[3]
    y, residual = whole(shape, dtype, 0, -3, 9), whole(shape, dtype, 1)
    weight, bias = normal((c,), torch.float32, 2), normal((c,), torch.float32, 3)
    for executor, kind in zip(executors(ptx, number), itertools.cycle((3, 0, 1, 2)), strict=False):
        run = Run(library, y, weight, bias, residual if kind & 1 else None, relu=bool(kind & 2), chip=chip)
        found = run.forward(executor)
        wide = run.tensors["y"].double()
        truth = wide.mean(0), (wide - wide.mean(0)).square().mean(0)
        peer = reference.statistics(y)
        for name, want, other in zip(("mean", "var"), truth, peer, strict=True):
            assert_parity(found[name], other, want, name)
            if rows & (rows - 1) == 0:
                assert torch.equal(found[name], want.float()), name
        assert_applied(run, found)


@pytest.mark.parametrize("number, shape, dtype, chip", list(cases()))
def test_backward(library, ptx, number, shape, dtype, chip):
    """Whole numbers, of which every sum is exact: bit for bit."""
    c = shape[1]
    y, residual, grad = whole(shape, dtype, 0), whole(shape, dtype, 1), whole(shape, dtype, 4)
    weight, bias = whole((c,), torch.float32, 2), whole((c,), torch.float32, 3) + 0.25
    mean, var = whole((c,), torch.float32, 5, -2, 2), torch.full((c,), 3.75)
    for executor, kind in zip(executors(ptx, number), itertools.cycle((3, 0, 1, 2)), strict=False):
        residual_read = residual if kind == 3 else None  # the caller leaves it out where no ReLU follows
        run = Run(library, y, weight, bias, residual_read, relu=bool(kind & 2), eps=0.25, chip=chip)
        found = run.backward(executor, grad, mean, var, keep=number % 2 == 0)
        g, d = lay(grad).float(), run.tensors["y"].float() - mean
        dz = torch.where(pre_activation(run, mean, var) > 0, g, 0.0) if run.relu else g
        total, against = dz.double().sum(0), (dz.double() * d.double()).sum(0)
        assert torch.equal(found["grad_bias"], total.float())
        assert torch.equal(found["grad_weight"], (against * 0.5).float())
        first, second = (total / len(d)).float(), (against / len(d)).float() * 0.25
        expected = weight * 0.5 * fused(-second, d, dz - first)
        assert torch.equal(found["grad_y"], expected.to(dtype))
        if "grad_residual" in found:
            assert torch.equal(found["grad_residual"], dz.to(dtype))


def gradients(run: Run, y, weight, bias, residual, grad, dtype) -> list[Tensor]:
    """The reference's gradients in a dtype, from statistics that it takes itself; maps as rows."""
    narrow = dtype if dtype != torch.float64 else torch.float64
    y, residual, grad = (t.to(narrow) for t in (y, residual, grad))
    weight, bias = (v.to(torch.float64 if dtype == torch.float64 else torch.float32) for v in (weight, bias))
    mean, var = reference.statistics(y)
    found = reference.backward(grad, y, weight, bias, residual, mean, var, run.eps, run.relu, True)
    return [lay(t) if t.dim() == 4 else t for t in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 13, 11), (2, 33, 9, 8), (2, 16, 32, 32)], ids=str)
def test_a_step_of_random_numbers(library, ptx, shape, dtype):
    """Forward, then backward with the statistics it found, over the same words of the barriers, by the rule."""
    c, chip = shape[1], ONE if shape[1] == 16 else Chip(5, *SIZES)
    y, residual, grad = (normal(shape, dtype, s, mean=0.5) for s in range(3))
    weight, bias = normal((c,), torch.float32, 3), normal((c,), torch.float32, 4)
    for executor in (FIBERS[3], cuda.Ptx(ptx)):
        run = Run(library, y, weight, bias, residual, chip=chip)
        ahead = run.forward(executor)
        assert_applied(run, ahead)
        found = run.backward(executor, grad, ahead["mean"], ahead["var"])
        assert run.plan.parts > 1 or run.plan.shared_items > 0
        peers, truths = (gradients(run, y, weight, bias, residual, grad, d) for d in (dtype, torch.float64))
        for name, peer, truth in zip(
            ("grad_y", "grad_weight", "grad_bias", "grad_residual"), peers, truths, strict=True
        ):
            assert_parity(found[name], peer, truth, name, metric="l2" if name == "grad_residual" else "max")


def test_schedules_give_the_same_bits(library, ptx):
    y, residual, grad = (normal((3, 24, 9, 11), torch.bfloat16, s) for s in range(3))
    weight, bias = normal((24,), torch.float32, 3), normal((24,), torch.float32, 4)
    results = []
    for executor in (*FIBERS, cuda.Fibers(11), cuda.Ptx(ptx)):
        run = Run(library, y, weight, bias, residual)
        ahead = run.forward(executor)
        results.append({**ahead, **run.backward(executor, grad, ahead["mean"], ahead["var"])})
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("offset", [1, 3])
def test_maps_off_alignment(library, ptx, offset):
    y, grad = whole((2, 16, 5, 3), torch.float16, 0), whole((2, 16, 5, 3), torch.float16, 1)
    ones = torch.ones(16)
    for executor in (FIBERS[2], cuda.Ptx(ptx)):
        aligned, shifted = (Run(library, y, ones, ones / 4, offset=o) for o in (0, offset))
        ahead, other = aligned.forward(executor), shifted.forward(executor)
        assert (aligned.plan.vector, shifted.plan.vector) == (8, 1)
        for name in ("mean", "var"):
            assert torch.allclose(ahead[name], other[name], rtol=1e-6, atol=1e-6)
        assert_applied(shifted, other)
        back = [r.backward(executor, grad, ahead["mean"], ahead["var"]) for r in (aligned, shifted)]
        assert torch.equal(back[0]["grad_bias"], back[1]["grad_bias"])
        assert torch.allclose(back[0]["grad_y"], back[1]["grad_y"], atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_far_from_zero(library, ptx, dtype):
    """Deviations that are a small part of the mean: statistics by the rule, whose peer is two passes in float32."""
    mean, deviation = (3000.0, 0.05) if dtype == torch.float32 else (100.0, 1.0)
    y = normal((3, 20, 13, 11), dtype, 0, mean, deviation)
    for executor in (FIBERS[0], cuda.Ptx(ptx)):
        run = Run(library, y, torch.ones(20), torch.zeros(20))
        found = run.forward(executor)
        wide = run.tensors["y"].double()
        peer = reference.statistics(y)
        assert_parity(found["mean"], peer[0], wide.mean(0), "mean")
        assert_parity(found["var"], peer[1], (wide - wide.mean(0)).square().mean(0), "var")
        assert_applied(run, found)


def test_constant_channels_and_one_row(library, ptx):
    weight, bias = whole((9,), torch.float32, 1), whole((9,), torch.float32, 2)
    constant = torch.full((2, 9, 7, 5), 0.1)
    constant[:, ::2] = 3e4
    one = normal((1, 9, 1, 1), torch.float32, 0)
    for executor, y in itertools.product((FIBERS[1], cuda.Ptx(ptx)), (constant, one)):
        run = Run(library, y, weight, bias, relu=False)
        found = run.forward(executor)
        assert torch.equal(found["mean"], y[0, :, 0, 0]) and not found["var"].any()
        assert torch.equal(found["out"], bias.expand(run.rows, 9))
        if y is one:
            back = run.backward(executor, torch.ones_like(y), found["mean"], found["var"])
            assert not back["grad_y"].any() and not back["grad_weight"].any() and (back["grad_bias"] == 1).all()


def test_nan_and_infinity_stay_in_their_channel(library):
    for dtype in DTYPES:
        y = whole((2, 16, 5, 5), dtype, 0)
        y[0, 3, 1, 1], y[1, 7, 0, 4] = float("nan"), float("inf")
        run = Run(library, y, torch.ones(16), torch.zeros(16))
        found = run.forward(FIBERS[0])
        bad = torch.zeros(16, dtype=torch.bool)
        bad[[3, 7]] = True
        assert torch.equal(found["var"].isnan(), bad) and torch.equal(found["out"].isnan().any(0), bad)


def test_threads_do_not_race(library):
    """Under ThreadSanitizer, which sees a missing barrier or fence on any schedule."""
    for shape, chip in (((2, 16, 12, 12), SMALL), (LARGER[0], ONE)):
        y, residual, grad = (normal(shape, torch.bfloat16, s) for s in range(3))
        run = Run(library, y, torch.ones(16), torch.zeros(16), residual, chip=chip)
        ahead = run.forward(Sanitized("thread"))
        assert_applied(run, ahead)
        run.backward(Sanitized("thread"), grad, ahead["mean"], ahead["var"])


@pytest.mark.parametrize("chip", [SMALL, ONE], ids=["registers", "shared memory"])
def test_every_map_moves_once(library, ptx, chip):
    """What the compiled kernels read and write is what the formulas of bytes.py say."""
    shape = LARGER[0] if chip is ONE else (2, 16, 13, 11)
    y, residual, grad = (normal(shape, torch.float16, s) for s in range(3))
    ones = torch.ones(16)
    run = Run(library, y, ones, ones, residual, chip=chip)
    moved = []

    class Counting(cuda.Ptx):
        def execute(self, library, function, problem, tensors):
            memory = GuardedMemory(tensors)
            for launch in library.record(function, problem):
                values = list(launch.values)
                run_ptx(ptx, memory, launch.grid, 256, launch.shared, values, entry=launch.name, cooperative=True)
            moved.append(memory.traffic())

    ahead = run.forward(Counting(ptx))
    run.backward(Counting(ptx), grad, ahead["mean"], ahead["var"])
    (forward,) = formula.forward(y, ones, ones, residual, 1e-5, True)
    (backward,) = formula.backward(grad, y, ones, ones, residual, ones, ones, 1e-5, True, True)
    for traffic, expected in zip(moved, (forward, backward), strict=True):
        for found, wanted in ((traffic.loaded, expected.reads), (traffic.stored, expected.writes)):
            assert {name: found[name] for name in wanted} == wanted
        assert not set(traffic.loaded) & set(expected.writes)


# ---- Planted errors --------------------------------------------------------------------------------------------------
def step(library, executor) -> None:
    y, grad = (normal((2, 16, 12, 12), torch.float16, s) for s in range(2))
    ones = torch.ones(16)
    run = Run(library, y, ones, ones)
    ahead = run.forward(executor)
    assert run.plan.parts > 1
    assert not any(t.isnan().any() for t in ahead.values())
    back = run.backward(executor, grad, ahead["mean"], ahead["var"])
    assert not any(t.isnan().any() for t in back.values())


def entry(text: str, name: str) -> tuple[int, int]:
    """Where a kernel's body lies."""
    start = re.search(rf"\.entry \w*{name}\w*", text)
    assert start is not None
    following = text.find(".entry", start.end())
    return start.start(), following if following > 0 else len(text)


@pytest.mark.parametrize("kernel", ["batch_norm_forwardINS0_4HalfELi8ELb0", "batch_norm_backwardINS0_4HalfELi8ELb0"])
def test_each_barrier_and_fence_is_needed(library, ptx, kernel):
    """Without one of them other threads' memory is read too early: a race, or a NaN that was there before."""
    step(library, cuda.Ptx(ptx))
    start, end = entry(ptx, kernel)
    found = [m.span() for pattern in (r"bar\.sync[^;]*;", r"membar\.gl;") for m in re.finditer(pattern, ptx[start:end])]
    assert len(found) > 10
    unnoticed = []
    for number, (a, b) in enumerate(found):
        broken = ptx[: start + a] + ptx[start + b :]
        try:
            step(library, cuda.Ptx(broken))
        except (SharedMemoryRace, EmulationError, AssertionError):
            continue
        unnoticed.append(number)
    assert not unnoticed, f"{unnoticed} of {len(found)}"


def test_blocks_that_wait_for_nobody_hang(library, ptx):
    """An arrival too few is found, not waited for."""
    start, end = entry(ptx, "batch_norm_forwardINS0_4HalfELi8ELb0")
    body = ptx[start:end]
    broken = re.sub(r"(atom\.global\.add\.u32\s+%r\d+, \[[^\]]+\]), [^;]+;", r"\1, 0;", body)
    assert broken != body
    with pytest.raises(Hang, match="wait for each other"):
        step(library, cuda.Ptx(ptx[:start] + broken + ptx[end:]))
