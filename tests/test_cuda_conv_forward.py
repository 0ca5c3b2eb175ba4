"""The CUDA convolution forward: the shapes of the Triton kernels, four precisions, as fibers and as the PTX nvcc makes."""

import ctypes
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from emulation import cuda, cuda_problems
from emulation.cuda_problems import PRECISIONS, TYPES, Affine, ConvForward, Geometry, pointer
from emulation.errors import EmulationError
from emulation.sanitized import Sanitized
from parity import assert_parity
from torch import Tensor
from triton_conv_cases import KINDS, SHAPES, Case, Inputs, integers, normals, peer_of, truth_of

from fastres.kernels.conv_act import reference as act_reference

ROOT = Path(__file__).parents[1]
SCHEDULES = cuda.fibers()
TILES = ("small", "tall", "large")


@pytest.fixture(scope="module")
def library() -> cuda.Library:
    found = cuda.build("conv_forward.cpp", ["-O1"])  # twice as fast to build
    cuda_problems.check(found, "conv_forward_size", ConvForward)
    return found


@pytest.fixture(scope="module")
def ptx() -> cuda.Ptx:
    return cuda.Ptx(cuda.ptx("conv_forward.cu"))


def geometry_of(case: Case, y: Tensor) -> Geometry:
    p, q = y.shape[2:]
    return Geometry(
        case.n, case.c, case.h, case.w, case.k, p, q, case.r, case.s, *case.stride, *case.padding, *case.dilation
    )


def nan(shape: tuple[int, ...], dtype: torch.dtype, off: int = 0) -> Tensor:
    """NaN, dense in channels_last, ``off`` elements behind an aligned address."""
    n, k, p, q = shape
    room = torch.full((n * k * p * q + off,), float("nan"), dtype=dtype)
    return room[off:].view(n, p, q, k).permute(0, 3, 1, 2)


def run(
    library: cuda.Library,
    case: Case,
    inputs: Inputs,
    kind: str,
    executor: cuda.Executor,
    epilogue: bool = False,
    tile: str = "",
    off: int = 0,
) -> list[Tensor]:
    """(y, mean, var) of conv_stats; or [y] with bias, residual and ReLU after it."""
    dense = torch.channels_last
    x, weight = inputs.x.contiguous(memory_format=dense), inputs.weight.contiguous(memory_format=dense)
    shape = tuple(inputs.residual.shape)
    y = nan(shape, x.dtype, off)
    memory: dict[str, Tensor] = {"x": x, "weight": weight, "y": y}
    p = ConvForward(TYPES[x.dtype], PRECISIONS["tf32" if kind == "tf32" else "float32"], geometry_of(case, y))
    p.x, p.weight, p.y = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    if inputs.vectors[0] is not None:
        p.prologue, p.prologue_relu = Affine.of(inputs.vectors), inputs.relu
        memory.update(zip(("scale", "center", "shift"), inputs.vectors, strict=True))
    if epilogue:
        memory.update(bias=inputs.bias, residual=inputs.residual.contiguous(memory_format=dense))
        p.bias_type, p.bias, p.residual, p.relu = TYPES[inputs.bias.dtype], pointer(inputs.bias), None, True
        p.residual = pointer(memory["residual"])
    else:
        found = [
            torch.full((size,), float("nan")) for size in (library.call("forward_workspace_of", p), case.k, case.k)
        ]
        memory.update(zip(("partial", "mean", "var"), found, strict=True))
        p.partial, p.mean, p.var = (t.data_ptr() for t in found)
    library.run("conv_forward" + (f"_{tile}" if tile else ""), p, executor, memory)
    return [y] if epilogue else [y, memory["mean"], memory["var"]]


def assert_exact(results: list[Tensor], truth: tuple[Tensor, ...]) -> None:
    """y bit for bit; the statistics, which divide, to a few units in the last place."""
    y = truth[0].to(results[0].dtype)
    assert torch.equal(results[0], y), f"{int((results[0] != y).sum())} of {y.numel()} elements differ"
    if len(results) > 1:
        stored = y.double()
        mean, var = stored.mean((0, 2, 3)), stored.var((0, 2, 3), correction=0)
        torch.testing.assert_close(results[1].double(), mean, rtol=1e-6, atol=1e-6 * float(stored.abs().max()))
        torch.testing.assert_close(results[2].double(), var, rtol=4e-6, atol=1e-6)


def act_truth(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    wide = (t.double() for t in (inputs.x, inputs.weight, inputs.bias, inputs.residual))
    return (act_reference.forward(*wide, True, *case.geometry),)


shapes = pytest.mark.parametrize("index", range(len(SHAPES)), ids=[str(case) for case in SHAPES])


@shapes
def test_exact_as_fibers(library: cuda.Library, index: int) -> None:
    """Integers, under every schedule, one warp starved among them: no index, mask, padding or barrier can hide."""
    case = SHAPES[index]
    for n, executor in enumerate(SCHEDULES):
        kind = KINDS[(index + n) % 4]
        inputs = integers(case, kind)
        assert_exact(run(library, case, inputs, kind, executor), truth_of(case, inputs))


@shapes
def test_exact_as_ptx(library: cuda.Library, ptx: cuda.Ptx, index: int) -> None:
    case, kind = SHAPES[index], KINDS[index % 4]
    inputs = integers(case, kind)
    assert_exact(run(library, case, inputs, kind, ptx), truth_of(case, inputs))


@shapes
def test_random(library: cuda.Library, ptx: cuda.Ptx, index: int) -> None:
    """The tolerance rule: fibers in two more precisions, PTX in another."""
    case = SHAPES[index]
    for offset, executor in ((1, SCHEDULES[0]), (2, SCHEDULES[2]), (3, ptx)):
        kind = KINDS[(index + offset) % 4]
        inputs = normals(case, kind)
        ours, peer, truth = (
            run(library, case, inputs, kind, executor),
            peer_of(case, inputs, kind),
            truth_of(case, inputs),
        )
        for name, got, other, true in zip(("y", "mean", "var"), ours, peer, truth, strict=True):
            assert_parity(got, other, true, f"{name} ({kind}, {executor})")


@shapes
def test_bias_residual_and_relu(library: cuda.Library, ptx: cuda.Ptx, index: int) -> None:
    """conv_act, exactly; the bias in float32 or in the dtype of the maps."""
    case = SHAPES[index]
    case = Case(**{**case.__dict__, "prologue": False})
    kind = KINDS[(index + 1) % 4]
    inputs = integers(case, kind)
    if index % 2:
        inputs = Inputs(**{**inputs.__dict__, "bias": inputs.bias.to(inputs.x.dtype)})
    for executor in (SCHEDULES[index % 4], *((ptx,) if index % 3 == 0 else ())):
        assert_exact(run(library, case, inputs, kind, executor, epilogue=True), act_truth(case, inputs))


BIG = (
    Case(2, 40, 9, 9, 136, 3, 3, padding=(1, 1)),
    Case(3, 48, 8, 9, 200, 1, 1),
    Case(2, 16, 15, 13, 72, 3, 3, (2, 2), (1, 1)),
)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", BIG, ids=str)
def test_every_tile(library: cuda.Library, ptx: cuda.Ptx, case: Case, tile: str) -> None:
    for n, executor in enumerate((*SCHEDULES, ptx)):
        kind = ("fp16", "bf16")[n % 2]
        inputs = integers(case, kind)
        assert_exact(run(library, case, inputs, kind, executor, tile=tile), truth_of(case, inputs))
        plain = Inputs(**{**inputs.__dict__, "vectors": (None,) * 3})
        assert_exact(run(library, case, plain, kind, executor, True, tile), act_truth(case, plain))


@pytest.mark.parametrize("kind", ("fp16", "fp32"))
def test_views_off_alignment_take_narrow_copies(library: cuda.Library, ptx: cuda.Ptx, kind: str) -> None:
    case = Case(2, 16, 5, 7, 24, 3, 3, padding=(1, 1))
    inputs = integers(case, kind)
    memory = torch.empty(inputs.x.numel() + 1, dtype=inputs.x.dtype)
    moved = memory[1:].view(2, 5, 7, 16).permute(0, 3, 1, 2).copy_(inputs.x)
    for executor in (SCHEDULES[3], ptx):
        moved_inputs = Inputs(**{**inputs.__dict__, "x": moved})
        assert_exact(run(library, case, moved_inputs, kind, executor, off=1), truth_of(case, inputs))


@pytest.mark.parametrize("sanitizer", ("thread", "address"))
def test_sanitized(sanitizer: str) -> None:
    """No races, and nothing outside of the tensors or shared memory: several tiles both ways, in padding, with statistics."""
    one = cuda.build("conv_forward_one.cpp")
    case = Case(2, 40, 7, 9, 70, 3, 3, (2, 2), (2, 1), (2, 1))
    inputs = integers(case, "fp16")
    assert_exact(run(one, case, inputs, "fp16", Sanitized(sanitizer)), truth_of(case, inputs))


def test_same_bits_whatever_the_schedule(library: cuda.Library, ptx: cuda.Ptx) -> None:
    case = Case(2, 24, 9, 9, 70, 3, 3, (2, 2), (1, 1))
    for kind in KINDS:
        inputs = normals(case, kind)
        first, *others = (run(library, case, inputs, kind, executor) for executor in SCHEDULES)
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), kind


def test_nan_and_infinity_stay_where_they_are(library: cuda.Library) -> None:
    """Also in float32 by three products, whose parts of an infinity would be NaN; and infinite coefficients beside padding."""
    case = Case(1, 8, 6, 6, 8, 3, 3, padding=(1, 1))
    for kind in KINDS:
        inputs = integers(case, kind)
        inputs.weight[:, 3] = 1.0
        inputs.vectors[0].fill_(1.0)
        inputs.vectors[1].zero_()
        for value in (float("nan"), float("inf")):
            inputs.x[0, 3, 2, 2] = value
            y = run(library, case, inputs, kind, SCHEDULES[0])[0]
            expected = torch.zeros(6, 6, dtype=torch.bool)
            expected[1:4, 1:4] = True
            hit = y.isnan() if value != value else y == value
            assert torch.equal(hit.all(1)[0], expected) and torch.equal(~y.isfinite().all(1)[0], expected), (
                kind,
                value,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_zero_after_the_prologue(library: cuda.Library, kind: str) -> None:
    """An infinite shift makes every pixel infinite; where only padding is read, the result is 0."""
    case = Case(1, 8, 4, 5, 8, 1, 1, padding=(1, 1))
    inputs = integers(case, kind)
    inputs.weight.fill_(1.0)
    inputs.vectors[2].fill_(float("inf"))
    y = run(library, case, inputs, kind, SCHEDULES[0])[0]
    assert (y[..., 1:-1, 1:-1] == float("inf")).all()
    assert (y == 0).sum() == 8 * (6 * 7 - 4 * 5)


def test_statistics_merge_over_levels(library: cuda.Library, ptx: cuda.Ptx) -> None:
    """More tiles than one block of the merge takes, and a mean far from zero."""
    case = Case(1, 8, 130, 66, 8, 1, 1, prologue=False)
    inputs = normals(case, "fp32")
    inputs.x.add_(1000.0)
    y, mean, var = run(library, case, inputs, "fp32", SCHEDULES[1])
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)
    again = run(library, case, inputs, "fp32", cuda.Fibers(5))
    assert torch.equal(again[1], mean) and torch.equal(again[2], var)


def test_the_choice_of_tiles_and_what_is_refused(library: cuda.Library) -> None:
    def tile(n: int, c: int, size: int, k: int, kind: torch.dtype = torch.float16) -> str:
        p = ConvForward(TYPES[kind], 0, Geometry(n, c, size, size, k, size, size, 1, 1, 1, 1, 0, 0, 1, 1))
        return TILES[library.call("forward_tile_of", p)]

    assert tile(256, 64, 56, 64) == "tall" and tile(256, 256, 14, 1024) == "large"
    assert tile(1, 512, 7, 2048) == "small" and tile(256, 256, 14, 1024, torch.float32) == "small"
    assert tile(256, 3, 224, 64) == "small"  # rows of 6 bytes

    def reason(*sizes: int) -> str:
        found = library.call("refusal_of", Geometry(*sizes), result=ctypes.c_char_p)
        return (found or b"").decode()

    assert reason(2, 8, 9, 9, 8, 9, 9, 3, 3, 1, 1, 1, 1, 1, 1) == ""
    assert "32 x 32" in reason(2, 8, 99, 99, 8, 9, 9, 33, 3, 1, 1, 1, 1, 1, 1)
    assert "pixels" in reason(70_000, 8, 211, 205, 8, 211, 205, 1, 1, 1, 1, 0, 0, 1, 1)


MUTATIONS: Mapping[str, tuple[str, str, str]] = {
    "padding before the prologue": ("cuda_gather.cuh", "if (!Flat && !visible(i, e % 2, 0)) a[i][e] = 0;", ""),
    "a channel too many": ("cuda_gather.cuh", "const bool exists = c < map.channels;", "const bool exists = true;"),
    "a row too many": ("cuda_forward.cuh", "if (m < total) {", "if (m <= total) {"),
    "a filter too many": ("cuda_forward.cuh", "first + row < filters", "first + row <= filters"),
    "taps transposed": ("cuda_gather.cuh", "own[i].has(ahead.r, ahead.s)", "own[i].has(ahead.s, ahead.r)"),
    "no dilation": ("cuda_forward_launch.cuh", "{{g.dilation_h, g.height}", "{{1, g.height}"),
    "a step too few": ("cuda_tile.cuh", "if (step < steps) {", "if (step < steps - 1) {"),
    "statistics of missing rows": ("cuda_forward.cuh", "row_of(i, e / 2) < total; };", "row_of(i, e / 2) >= 0; };"),
    "a tile not merged": ("cuda_merge.cuh", "exists && tile < last;", "exists && tile < last - 1;"),
    "a wrong row of a fragment": ("cuda_tile.cuh", "i * 16 + lane % 16) * kPitch", "i * 16 + lane % 8) * kPitch"),
    "a wait too short": ("cuda_tile.cuh", "wait_copies<Tile::kStages - 2>();", "wait_copies<Tile::kStages - 1>();"),
    "no barrier in the loop": ("cuda_tile.cuh", "__syncthreads();  // this step has landed", "// this step has landed"),
    "no barrier before the store": (
        "cuda_output.cuh",
        "static_cast<T*>(global);\n    __syncthreads();",
        "static_cast<T*>(global);",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_kernels_are_seen(name: str, tmp_path: Path) -> None:
    file, old, new = MUTATIONS[name]
    for folder in ("kernels", "tests/emulation"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = tmp_path / "kernels" / "conv" / file
    text = path.read_text()
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new))
    here = tmp_path / "tests" / "emulation"
    mutated = cuda.build(here / "conv_forward_one.cpp", ["-O1", "-Wno-error"])
    case = Case(2, 40, 7, 9, 70, 3, 3, (2, 2), (2, 1), (2, 1))
    inputs = integers(case, "fp16")

    def seen(executor: cuda.Executor) -> bool:
        try:
            assert_exact(run(mutated, case, inputs, "fp16", executor), truth_of(case, inputs))
        except (AssertionError, EmulationError):
            return True
        return False

    # What is read past a tensor's end and multiplied by zero shows in the PTX interpreter's guarded memory only.
    assert any(map(seen, SCHEDULES)) or seen(cuda.Ptx(cuda.ptx(here / "conv_forward_one.cu")))
