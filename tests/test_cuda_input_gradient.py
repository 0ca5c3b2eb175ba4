"""The CUDA input gradient of conv_stats without a GPU, as fibers and as nvcc's PTX, against the reference."""

import ctypes
import math
import mmap
import re
import shutil
from pathlib import Path

import pytest
import torch
from emulation import cuda
from emulation.cuda_problems import PRECISIONS, TYPES, Affine, ConvBackward, Geometry, check, pointer
from emulation.errors import EmulationError, SharedMemoryRace
from emulation.memory import GuardedMemory
from emulation.ptx import run_ptx
from emulation.sanitized import Sanitized
from gradient_cases import ARRIVING, DTYPES, PROLOGUES, SHAPES, Arguments, Shape, arguments, tf32_peer
from parity import SLACK, assert_parity, error_of, floor_of
from torch import Tensor
from triton_cases import whole_numbers, whole_vectors

from fastres.kernels.conv_stats import reference

NAMES = ("grad_x", "grad_scale", "grad_shift")
ALIGNED, SINGLE, HALFWAY = 0, 1, 4  # elements that a map lies off a multiple of 16 bytes


@pytest.fixture(scope="module")
def library():
    found = cuda.build("conv_input_gradient.cpp", ["-O1"])  # twice as fast to build
    check(found, "conv_backward_size", ConvBackward)
    return found


@pytest.fixture(scope="module")
def ptx():
    return cuda.Ptx(cuda.ptx("conv_input_gradient.cu"))


def room(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
    """NaN, dense, ``offset`` elements off alignment, with NaN behind it."""
    size = math.prod(shape)
    return torch.full((offset + size + 4096,), float("nan"), dtype=dtype)[offset : offset + size].view(shape)


def untouched(t: Tensor) -> bool:
    """Whether there is still NaN around what room() gave."""
    base, first = t._base, t.storage_offset()
    assert base is not None
    return bool(base[:first].isnan().all() and base[first + t.numel() :].isnan().all())


def problem_and_tensors(library, a: Arguments, precision: str, offsets: tuple[int, ...], workspace: str):
    """The problem and its tensors by name, maps as [N, H, W, C] and weights as [K, R, S, C].

    offsets: of grad_y, y, weight, x, addend and grad_x, in turn. What isn't read isn't there.
    """
    maps = {"grad_y": a.grad_y, "y": a.y if a.grad_var is not None else None, "weight": a.weight}
    maps |= {"x": a.x if a.scale is not None else None, "addend": a.addend, "grad_x": a.x}
    tensors: dict[str, Tensor] = {}
    for i, (name, t) in enumerate(maps.items()):
        if t is not None:
            like = t.permute(0, 2, 3, 1)
            tensors[name] = room(tuple(like.shape), t.dtype, offsets[i % len(offsets)])
            if name != "grad_x":
                tensors[name].copy_(like)
    vectors = {"mean": a.mean if a.grad_var is not None else None, "grad_mean": a.grad_mean, "grad_var": a.grad_var}
    tensors |= {name: t for name, t in (*vectors.items(), ("factor", a.factor)) if t is not None}
    n, c, h, w = a.x.shape
    shape = Geometry(n, c, h, w, *a.y.shape[1:], *a.weight.shape[2:], *a.stride, *a.padding, *a.dilation)
    p = ConvBackward(type=TYPES[a.x.dtype], precision=PRECISIONS[precision], shape=shape, prologue_relu=a.relu)
    if a.scale is not None:
        tensors["grad_scale"], tensors["grad_shift"] = (room((c,), torch.float32) for _ in range(2))
    for name, t in tensors.items():
        setattr(p, name, pointer(t))
    if a.scale is not None:
        p.prologue = Affine.of((a.scale, a.center, a.shift))
        tensors |= {"scale": a.scale, "center": a.center, "shift": a.shift}
        tensors["workspace"] = room((library.call(workspace, p),), torch.float32)
        p.workspace = pointer(tensors["workspace"])
    return p, tensors


def backward(library, a: Arguments, executor, precision="float32", offsets=(0,), tile=""):
    """(grad_x [N, C, H, W], grad_scale, grad_shift)."""
    of_tile = "_of_128_rows" if tile in ("tall", "large") else "_of"
    p, tensors = problem_and_tensors(library, a, precision, offsets, f"input_gradient_workspace{of_tile}")
    library.run("input_gradient" + (f"_{tile}" if tile else ""), p, executor, tensors)
    for name in (*NAMES, "workspace"):
        assert name not in tensors or untouched(tensors[name]), f"something is written past the end of {name}"
    if a.scale is not None and a.x.isfinite().all():
        assert not tensors["workspace"].isnan().any(), "a part of the workspace is never written"
    return tensors["grad_x"].permute(0, 3, 1, 2), tensors.get("grad_scale"), tensors.get("grad_shift")


def precision_of(kind: str) -> str:
    return "tf32" if kind == "tf32" else "float32"


def input_part(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results[0], *results[2:4]


def assert_exact(ours, a: Arguments) -> None:
    """Equal to the truth, rounded once, bit for bit (either sign of zero)."""
    truth = input_part(reference.backward(*a._replace(need_weight=False).double()))
    for name, got, want in zip(NAMES, ours, truth, strict=True):
        if got is None:
            assert not want.numel(), name
            continue
        want = want.to(got.dtype)
        assert torch.equal(got, want), f"{name}: {(got.double() - want.double()).abs().max()} off"


def variant(i: int) -> tuple[str, tuple[bool, ...], str, tuple[int, ...]]:
    """Shape i's dtype, arriving gradients, prologue and alignments: all of them occur, each with several of the others."""
    offsets = (
        (ALIGNED,),
        (ALIGNED, ALIGNED, HALFWAY),
        (ALIGNED,),
        (ALIGNED, SINGLE),
        (ALIGNED, ALIGNED, ALIGNED, SINGLE),
    )
    return tuple(DTYPES)[i % 4], ARRIVING[i % 7 if i % 3 else 0], PROLOGUES[(i // 2) % 3], offsets[(i // 3) % 5]


def executor_of(name: str, i: int, ptx):
    """Every fourth shape starves a warp, every fourth lets copies land early."""
    return ptx if name == "ptx" else cuda.Fibers(i % 4)


EXECUTORS = pytest.mark.parametrize("executor", ("fibers", "ptx"))


@EXECUTORS
@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_exact_integers(library, ptx, i: int, executor: str):
    kind, arriving, prologue, offsets = variant(i)
    a = arguments(SHAPES[i], DTYPES[kind], arriving, prologue, seed=i)
    assert_exact(backward(library, a, executor_of(executor, i, ptx), precision_of(kind), offsets), a)


RANDOM = [(i, "fibers") for i in range(len(SHAPES))] + [(i, "ptx") for i in range(1, len(SHAPES), 3)]


@pytest.mark.parametrize(("i", "executor"), RANDOM, ids=lambda v: v if isinstance(v, str) else str(SHAPES[v]))
def test_random_numbers(library, ptx, i: int, executor: str):
    kind, arriving, prologue, offsets = variant(i + 1)
    a = arguments(SHAPES[i], DTYPES[kind], arriving, prologue, exact=False, seed=i)
    assert_rule(backward(library, a, executor_of(executor, i, ptx), precision_of(kind), offsets), a, kind, i)


def assert_rule(ours, a: Arguments, kind: str, i: int) -> None:
    def peer_of(b: Arguments) -> tuple[Tensor, ...]:
        return input_part(tf32_peer(b) if kind == "tf32" else reference.backward(*b))

    truth = input_part(reference.backward(*a.double()))
    assert_parity(ours[0], peer_of(a)[0], truth[0], "grad_x")
    if a.scale is None:
        return
    # The sums are a few numbers, and how wrong the peer is in a few numbers is chance: its worst of some draws counts.
    worst = [0.0, 0.0]
    case = SHAPES[i], a.x.dtype, tuple(t is not None for t in a[:3]), "relu" if a.relu else "affine"
    for seed in range(4):
        b = arguments(*case, exact=False, seed=100 * seed + i)
        sums = zip(peer_of(b)[1:], input_part(reference.backward(*b.double()))[1:], strict=True)
        for j, (other, true) in enumerate(sums):
            if true.any():
                worst[j] = max(worst[j], error_of(other, true, "max") / true.abs().max().item())
    for name, got, true, relative in zip(NAMES[1:], ours[1:], truth[1:], worst, strict=True):
        allowed = SLACK * relative * true.abs().max().item() if true.numel() else 0.0
        assert got.shape == true.shape and error_of(got, true, "max") <= allowed + floor_of(true, got.dtype), name


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("arriving", ARRIVING, ids=lambda a: "".join("yn"[not flag] for flag in a))
def test_every_combination_of_gradients(library, arriving, prologue):
    for n, shape in enumerate((WIDE[1], SHAPES[14], WIDE[0])):
        kind = tuple(DTYPES)[(n + len(prologue)) % 4]
        a = arguments(shape, DTYPES[kind], arriving, prologue)
        assert_exact(backward(library, a, cuda.Fibers(n), precision_of(kind)), a)


@EXECUTORS
@pytest.mark.parametrize("i", range(0, len(SHAPES), 5), ids=lambda i: str(SHAPES[i]))
def test_an_addend_and_a_factor(library, ptx, i: int, executor: str):
    """Another gradient of x, added as it is stored; a factor a channel of grad_y, applied as it is read."""
    kind, arriving, prologue, offsets = variant(i)
    for j, (adds, scales) in enumerate(((True, False), (False, True), (True, True))):
        if j != i % 3 and executor == "ptx":
            continue  # each of the three by a third of the shapes
        a = with_more(arguments(SHAPES[i], DTYPES[kind], arriving, prologue, seed=i), i, adds, scales)
        assert_exact(backward(library, a, executor_of(executor, i + j, ptx), precision_of(kind), offsets), a)


def with_more(a: Arguments, seed: int, adds: bool = True, scales: bool = True) -> Arguments:
    addend = whole_numbers(tuple(a.x.shape), a.x.dtype, "channels_last", seed=seed + 1)
    factor = whole_vectors(a.y.shape[1], seed=seed)[0]
    return a._replace(addend=addend if adds else None, factor=factor if scales else None)


# Aligned channels, in several tiles of rows, of columns and of the reduction, with phases of different sizes.
WIDE = (
    Shape(1, 136, 11, 13, 40, 1, 1),
    Shape(2, 72, 13, 11, 40, 3, 3, (2, 2), (1, 1)),
    Shape(2, 136, 8, 8, 24, 3, 3, (1, 1), (1, 1)),
    Shape(1, 72, 19, 17, 8, 1, 1, (2, 2)),
    Shape(1, 144, 13, 14, 16, 3, 2, (3, 2), (2, 1), (2, 3)),
    Shape(1, 16, 14, 14, 8, 7, 7, (2, 2), (3, 3)),
    Shape(1, 72, 4, 8, 40, 1, 1),
)
TILES = {"small": ("fp16", "bf16", "fp32", "tf32"), "tall": ("fp16", "bf16"), "large": ("bf16", "fp16")}


@EXECUTORS
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("i", range(len(WIDE)), ids=lambda i: str(WIDE[i]))
def test_every_tile(library, ptx, i: int, tile: str, executor: str):
    """The larger ones are chosen for maps that are too large to emulate: here the test asks for them."""
    for n, kind in enumerate(TILES[tile]):
        if executor == "ptx" and n != i % len(TILES[tile]):
            continue
        a = arguments(WIDE[i], DTYPES[kind], ARRIVING[(i + n) % 5], PROLOGUES[(i + n) % 3], seed=i)
        a = with_more(a, i, i % 2 == 1, n % 2 == 1)
        assert_exact(backward(library, a, executor_of(executor, i + n, ptx), precision_of(kind), tile=tile), a)


@EXECUTORS
def test_sums_in_two_levels(library, ptx, executor: str):
    """As many phases as pixels: a tile each, more than one block of the second kernel adds up. All but one meet no tap."""
    a = arguments(Shape(1, 5, 12, 12, 8, 1, 1, (12, 12)), torch.float16)
    assert_exact(backward(library, a, executor_of(executor, 1, ptx)), a)


def test_schedules_give_the_same_bits(library):
    a = with_more(arguments(WIDE[1], torch.bfloat16, exact=False), 0)
    first, *others = (backward(library, a, executor) for executor in cuda.fibers())
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


def test_not_a_number_stays_where_it_is(library):
    """In one pixel of grad_y: its window only. In one of x: the ReLU's mask shuts, the sums are NaN like the reference's."""
    a = arguments(WIDE[2], torch.float16, (True, False, False))
    a.grad_y[1, 3, 4, 5] = float("nan")
    a.x[0, 7, 2, 2] = float("nan")
    truth = input_part(reference.backward(*a))
    for got, want in zip(backward(library, a, cuda.Fibers(2)), truth, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("offset", (ALIGNED, SINGLE), ids=("wide", "flat"))
def test_offsets_past_2_to_the_31(library, offset):
    """A gradient of 5e9 elements, nearly all of it in the padding: four pixels are read, the rest of the memory is reserved."""
    a = with_more(arguments(Shape(1, 16, 2, 2, 128, 1, 1), torch.float16, (True, False, False)), 0)
    p, tensors = problem_and_tensors(library, a, "float32", (0,), "input_gradient_workspace_of")
    pad_h, pad_w, k = 500, 20000, a.y.shape[1]
    height, width = 2 + 2 * pad_h, 2 + 2 * pad_w
    no_reserve = 0x4000  # MAP_NORESERVE of Linux
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * (height * width * k + offset), flags=flags)
    grad_y = torch.frombuffer(memory, dtype=torch.float16)[offset:].view(1, height, width, k)
    grad_y[:, pad_h : pad_h + 2, pad_w : pad_w + 2] = tensors["grad_y"]
    assert (pad_h * width + pad_w) * k > 2**31
    p.grad_y = pointer(grad_y)
    p.shape.pad_h, p.shape.pad_w, p.shape.out_height, p.shape.out_width = pad_h, pad_w, height, width
    library.run("input_gradient", p, cuda.Fibers(0), {**tensors, "grad_y": grad_y})
    assert_exact((tensors["grad_x"].permute(0, 3, 1, 2), tensors["grad_scale"], tensors["grad_shift"]), a)


@pytest.mark.parametrize("sanitizer", ("thread", "address"))
def test_sanitizers_find_nothing(sanitizer):
    """Copies of 16 bytes and of single elements, several tiles both ways."""
    library = cuda.build("conv_input_gradient_one.cpp")
    for shape in (WIDE[1], WIDE[6], Shape(1, 9, 7, 5, 11, 3, 3, (2, 2), (1, 1))):
        a = with_more(arguments(shape, torch.float16), 0, scales=False)
        assert_exact(backward(library, a, Sanitized(sanitizer)), a)


def test_a_removed_barrier_or_wait_is_seen(library, ptx):
    """In the PTX of one kernel with everything in its epilogue."""
    a = with_more(arguments(WIDE[6], torch.float16), 0, scales=False)
    p, tensors = problem_and_tensors(library, a, "float32", (0,), "input_gradient_workspace_of")
    name = library.record("input_gradient", p)[0].name
    start = ptx.text.index(f".entry {name}(")
    end = ptx.text.index("\n}", start)
    places = list(re.finditer(r"(bar(rier)?\.(cta\.)?sync|cp\.async\.wait_group)[^;]*;", ptx.text[start:end]))
    # Not needed here: the wait after the loop, when nothing is under way, and the barriers at the end of sum_columns, whose
    # sums the threads that made them write away.
    spare = {3, 8, 11}
    assert len(places) == 13
    for n, found in enumerate(places):
        if n not in spare:
            text = ptx.text[: start + found.start()] + ptx.text[start + found.end() :]
            with pytest.raises(SharedMemoryRace):
                library.run("input_gradient", p, cuda.Ptx(text), tensors)


def problem_of(n, c, size, k, r, stride, dtype="float16") -> ConvBackward:
    out = (size - 1) // stride + 1
    shape = Geometry(n, c, size, size, k, out, out, r, r, stride, stride, r // 2, r // 2, 1, 1)
    return ConvBackward(TYPES[getattr(torch, dtype)], 0, shape, grad_y=4096, weight=4096, grad_scale=4096)


def test_tiles_and_workspaces(library):
    """What the host decides of shapes that have no memory here."""
    for problem, tile, tiles in (
        (problem_of(256, 64, 56, 64, 3, 1), 1, 256 * 56 * 56 // 128),
        (problem_of(256, 256, 56, 64, 1, 1), 2, 256 * 56 * 56 // 128),
        (problem_of(256, 128, 56, 128, 3, 2), 2, 4 * 256 * 28 * 28 // 128),
        (problem_of(2, 512, 7, 512, 3, 1), 0, 2),
        (problem_of(256, 63, 56, 64, 3, 1), 0, 256 * 56 * 56 // 64),
        (problem_of(256, 64, 56, 60, 3, 1), 0, 256 * 56 * 56 // 64),
        (problem_of(256, 64, 56, 64, 3, 1, "float32"), 0, 256 * 56 * 56 // 64),
    ):
        assert library.call("input_gradient_tile_of", problem) == tile
        floats, channels = 0, problem.shape.channels
        while True:
            floats += tiles * 2 * channels
            if tiles <= 128:
                break
            tiles = -(-tiles // 128)
        assert library.call("input_gradient_workspace_of", problem) == floats


def test_what_is_refused(library):
    def reason(shape: Geometry) -> str:
        return (library.call("input_gradient_refusal_of", shape, result=ctypes.c_char_p) or b"").decode()

    assert reason(problem_of(256, 64, 56, 64, 3, 1).shape) == ""
    assert "32 x 32" in reason(problem_of(1, 64, 56, 64, 33, 1).shape)
    assert "tiles" in reason(problem_of(1, 128, 40000, 64, 1, 40000).shape)


@pytest.mark.parametrize("arriving", ((True, True, True), (True, False, False)), ids=("statistics", "plain"))
@pytest.mark.parametrize("i", (1, 6), ids=lambda i: str(WIDE[i]))
def test_every_byte_is_in_the_formulas(library, ptx, i: int, arriving):
    """README.md's table against the interpreter's count, each byte once; channel vectors aside."""
    a = with_more(arguments(WIDE[i], torch.float16, arriving), 0, scales=False)
    p, tensors = problem_and_tensors(library, a, "float32", (0,), "input_gradient_workspace_of")
    found = []
    for launch in library.record("input_gradient", p):
        memory = GuardedMemory(tensors)
        run_ptx(ptx.text, memory, launch.grid, launch.block[0], launch.shared, list(launch.values), entry=launch.name)
        found.append(memory.traffic())
    maps = {name: t.numel() * t.element_size() for name, t in tensors.items() if t.dim() == 4}
    grad_x, partials = maps.pop("grad_x"), 4 * tensors["workspace"].numel()
    vectors = {"mean", "grad_mean", "grad_var", "scale", "center", "shift"}
    reads = [{k: v for k, v in one.unique_loaded.items() if k not in vectors} for one in found]
    assert reads == [maps, {"workspace": partials}]
    assert found[0].unique_stored == {"grad_x": grad_x, "workspace": partials}
    assert found[1].unique_stored == {name: 4 * WIDE[i].c for name in NAMES[1:]}


KERNEL, GATHER, SUMS = "conv_stats/cuda_input_gradient.cuh", "conv/cuda_gather.cuh", "conv_stats/cuda_sums.cuh"
BROKEN = {
    "nothing": (KERNEL, "targets", "targets"),  # passes
    "no padding mask": (GATHER, "if (!Flat && !visible(i, e % 2, 0))", "if (false)"),
    "an off-by-one padding mask": (GATHER, "< static_cast<unsigned>(size)", "<= static_cast<unsigned>(size)"),
    "a phase's last row": (KERNEL, "(g.height - phase_h + g.stride_h - 1)", "(g.height - phase_h)"),
    "a phase's neighbour": (KERNEL, "w * g.stride_w + phase_w", "w * g.stride_w"),
    "another phase's tap": (KERNEL, "met_h.first * g.filter_width + met_w.first", "met_h.first * g.filter_width"),
    "a tap too few": (KERNEL, "(taps - tap + step - 1) / step", "(taps - tap) / step"),
    "a step of taps": (KERNEL, "launch.step_h * g.filter_width", "g.filter_width"),
    "the ReLU's mask": (KERNEL, "!(z > 0.0f)", "!(z >= 0.0f)"),
    "the raw input in the sum": (KERNEL, "(x - entry(p.prologue.center, j, e % 2))", "x"),
    "rows past the end": (KERNEL, "targets[row] < 0 || ", ""),
    "a filter past the end": (KERNEL, "k < map.channels && ", ""),
    "a channel past the end": (KERNEL, "if (c < g.channels) p.workspace", "p.workspace"),
    "another tile's sums": (KERNEL, "(static_cast<int64_t>(part) * 2", "(static_cast<int64_t>(part / 2) * 2"),
    "the last tile's sums": (SUMS, "tile < last", "tile + 1 < last"),
    "no wait for x": (KERNEL, "if (affine || add) Output<Tile>::arrived()", ""),
    "no addend": (KERNEL, "if (add) other.fetch", "if (add && affine) out.fetch"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_seen(what: str, tmp_path: Path):
    file, old, new = BROKEN[what]
    for folder in ("kernels", "tests/emulation"):
        shutil.copytree(cuda.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    broken = tmp_path / "kernels" / file
    source = broken.read_text()
    assert source.count(old) >= 1, "the mutation no longer applies"
    broken.write_text(source.replace(old, new))
    library = cuda.build(tmp_path / "tests" / "emulation" / "conv_input_gradient_one.cpp", ("-O0", "-Wno-error"))

    def run() -> None:
        for shape in (WIDE[1], WIDE[0], WIDE[2], WIDE[6], Shape(2, 20, 9, 9, 40, 3, 3, (2, 2))):
            a = with_more(arguments(shape, torch.float16), 0, scales=False)
            assert_exact(backward(library, a, cuda.Fibers(2)), a)

    if old == new:
        return run()
    with pytest.raises((AssertionError, EmulationError)):
        run()
