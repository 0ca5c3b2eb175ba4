"""conv_stats' weight gradient in CUDA, run as C++ (fibers) and as the PTX that nvcc emits: the matrix of the Triton kernel."""

import ctypes
import functools
import hashlib
import itertools
import mmap
import re

import pytest
import torch
from emulation import cuda
from emulation.cuda_problems import PRECISIONS, TYPES, Affine, ConvBackward, Geometry, check, pointer
from emulation.errors import EmulationError, SharedMemoryRace
from emulation.memory import GuardedMemory
from emulation.ptx import run_ptx
from emulation.sanitized import Sanitized
from gradient_cases import ARRIVING, DTYPES, PROLOGUES, SHAPES, Arguments, Shape, arguments, tf32_peer
from parity import assert_parity
from torch import Tensor

from fastres.kernels.conv_stats import reference

FILES = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "float"}
SOURCES = ("common", "conv", "conv_stats")
# So that small maps have several splits and large tiles too; the constants are the host's, and no kernel knows them.
SHAPE = "conv_stats/cuda_weight_shape.h"
SMALL = ((SHAPE, "kFewestWeightSteps = 8", "kFewestWeightSteps = 2"), (SHAPE, "many = 256", "many = 1"))


def build(*changes: tuple[str, str, str], flags: tuple[str, ...] = ()) -> cuda.Library:
    """The kernels and their host code with (file, old, new) replaced."""
    texts = {
        str(file.relative_to(cuda.ROOT / "kernels")): file.read_text()
        for folder in SOURCES
        for file in sorted((cuda.ROOT / "kernels" / folder).glob("cuda_*.*h"))
    }
    for name, old, new in changes:
        assert old in texts[name], f"{old!r} is not in {name}"
        texts[name] = texts[name].replace(old, new)
    root = cuda.BUILD / f"weight_gradient-{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}"
    if not root.exists():
        for name, text in texts.items():
            path = root / "partial" / "kernels" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return cuda.build("weight_gradient.cpp", ("-iquote", str(root / "partial"), *flags))


@pytest.fixture(scope="module")
def library():
    found = build(*SMALL)
    check(found, "problem_size", ConvBackward)
    return found


@functools.cache
def ptx(dtype: torch.dtype) -> str:
    return cuda.ptx(cuda.ROOT / "csrc" / "cuda" / f"conv_weight_gradient_{FILES[dtype]}.cu")


BORDER = 64  # elements of NaN on either side of a map


def rows(t: Tensor | None, offset: int = 0) -> Tensor | None:
    """[N, C, H, W] as [N, H, W, C] in memory, ``offset`` elements off alignment, with a border of NaN; or none."""
    if t is None:
        return None
    t = t.permute(0, 2, 3, 1)
    room = torch.full((t.numel() + 2 * BORDER + offset,), float("nan"), dtype=t.dtype)
    place = room[BORDER + offset :][: t.numel()].view(t.shape)
    place.copy_(t)
    return place


def border(place: Tensor) -> Tensor:
    """What lies on either side of it."""
    room = place.as_strided((place.untyped_storage().nbytes() // place.element_size(),), (1,), 0)
    return torch.cat([room[: place.storage_offset()], room[place.storage_offset() + place.numel() :]])


class Problem:
    """A backward pass as the kernels take it; ``offset``: elements that all maps lie off alignment."""

    def __init__(self, a: Arguments, kind: str = "", offset: int = 0) -> None:
        k, c, r, s = a.weight.shape
        n, _, h, w = a.x.shape
        (*_, p, q) = a.y.shape
        maps = {"grad_y": rows(a.grad_y, offset), "y": rows(a.y, offset), "x": rows(a.x, offset)}
        vectors = {name: getattr(a, name) for name in ("mean", "grad_mean", "grad_var", "factor")}
        prologue = None if a.scale is None else (a.scale, a.center, a.shift)
        geometry = Geometry(n, c, h, w, k, p, q, r, s, *a.stride, *a.padding, *a.dilation)
        precision = PRECISIONS["tf32" if kind == "tf32" else "float32"]
        self.struct = ConvBackward(TYPES[a.x.dtype], precision, geometry)
        for name, tensor in (maps | vectors).items():
            setattr(self.struct, name, pointer(tensor))
        self.struct.prologue, self.struct.prologue_relu = Affine.of(prologue), a.relu
        self.inputs = {name: t for name, t in (maps | vectors).items() if t is not None}
        self.inputs |= {} if prologue is None else dict(zip(("scale", "center", "shift"), prologue, strict=True))
        self.result = rows(torch.full(a.weight.shape, float("nan"), dtype=a.weight.dtype), offset)
        self.struct.grad_weight = pointer(self.result)

    def plan(self, library) -> dict[str, int]:
        names = ("flat", "tile", "row_tiles", "column_tiles", "steps", "splits", "each")
        numbers = (ctypes.c_int64 * len(names))()
        library.call("plan", self.struct, numbers, result=None)
        return dict(zip(names, numbers, strict=True))

    def run(self, library, executor) -> Tensor:
        """grad_weight [K, C, R, S], as it lies in memory; NaN before, as the workspace."""
        self.result.fill_(float("nan"))
        workspace = torch.full((library.call("workspace", self.struct) + 2 * BORDER,), float("nan"))[BORDER:-BORDER]
        self.struct.workspace = pointer(workspace)
        tensors = {**self.inputs, "grad_weight": self.result, "workspace": workspace}
        library.run("weight_gradient", self.struct, executor, tensors)
        assert border(self.result).isnan().all() and border(workspace).isnan().all()
        return self.result.permute(0, 3, 1, 2)


def executors(dtype: torch.dtype, seed: int = 0) -> dict[str, cuda.Executor]:
    return {"fibers": cuda.Fibers(seed), "ptx": cuda.Ptx(ptx(dtype))}


def truth_of(a: Arguments) -> Tensor:
    return reference.backward(*a.double()._replace(need_input=False))[1]


def assert_exact(got: Tensor, a: Arguments) -> None:
    want = truth_of(a).to(got.dtype)
    assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()} differ"


def variant(i: int) -> tuple[str, tuple[bool, ...], str, int]:
    """Shape i's dtype, arriving gradients, prologue and offset: all of them occur, each with several of the others."""
    return tuple(DTYPES)[i % 4], ARRIVING[i % 7 if i % 3 else 0], PROLOGUES[(i // 2) % 3], (0, 0, 1, 4)[(i // 3) % 4]


# Columns that are channels of one tap, for which most shapes shared with Triton have too few: each tile, one and several of
# it, ragged and full; every kind of filter; many splits. And few channels that take 16-byte copies.
WIDE = (
    Shape(2, 40, 8, 8, 48, 3, 3, (1, 1), (1, 1)),
    Shape(1, 48, 9, 7, 64, 5, 5, (2, 2), (2, 2)),
    Shape(1, 72, 6, 6, 56, 3, 3, (1, 1), (2, 2), (2, 2)),
    Shape(4, 64, 8, 8, 72, 3, 3, (2, 1), (1, 1)),
    Shape(1, 56, 8, 8, 128, 1, 1),
    Shape(3, 40, 9, 9, 264, 1, 1, (2, 2)),
    Shape(1, 72, 8, 8, 136, 3, 3, (1, 1), (1, 1)),
    Shape(2, 136, 4, 4, 264, 1, 1),
    Shape(1, 128, 4, 4, 128, 2, 2, (1, 1), (1, 1)),
    Shape(4, 72, 7, 7, 72, 1, 3, (1, 2), (0, 1)),
    Shape(3, 24, 20, 20, 16, 1, 1),
    Shape(2, 32, 8, 8, 24, 3, 3, (1, 1), (1, 1)),
    Shape(2, 24, 9, 9, 8, 3, 3, (2, 2), (1, 1)),
)
MATRIX = SHAPES + WIDE


@pytest.mark.parametrize("executor", ("fibers", "ptx"))
@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_exact_integers(library, i: int, executor: str):
    kind, arriving, prologue, offset = variant(i)
    a = arguments(SHAPES[i], DTYPES[kind], arriving, prologue, seed=i)
    assert_exact(Problem(a, kind, offset).run(library, executors(DTYPES[kind], i)[executor]), a)


@pytest.mark.parametrize("executor", ("fibers", "ptx"))
@pytest.mark.parametrize("i", range(len(WIDE)), ids=lambda i: str(WIDE[i]))
def test_exact_integers_of_wide_copies(library, i: int, executor: str):
    """Each tile with each transform of both operands."""
    for j, kind in enumerate(("fp16", "bf16", "fp16", "fp32" if i % 2 else "tf32")):
        a = arguments(WIDE[i], DTYPES[kind], ARRIVING[(0, 1, 1, 3)[j]], PROLOGUES[(0, 2, 1, 0)[(i + j) % 4]], seed=i)
        assert_exact(Problem(a, kind).run(library, executors(DTYPES[kind], i + j)[executor]), a)


def test_the_shapes_meet_every_variant(library):
    seen = set()
    for i, shape in enumerate(SHAPES):
        kind, *_, offset = variant(i)
        plan = Problem(arguments(shape, DTYPES[kind]), kind, offset).plan(library)
        seen.add((plan["flat"], plan["tile"], plan["splits"] > 1))
    for shape in WIDE:
        plan = Problem(arguments(shape, torch.float16)).plan(library)
        seen.add((plan["flat"], plan["tile"], plan["splits"] > 1))
    assert seen == {
        (1, 0, False),
        (1, 0, True),
        *((0, tile, several) for tile in range(3) for several in (False, True)),
    }


RANDOM = [(i, "fibers") for i in range(len(MATRIX))] + [(i, "ptx") for i in range(0, len(MATRIX), 3)]


@pytest.mark.parametrize(("i", "executor"), RANDOM, ids=lambda v: v if isinstance(v, str) else str(MATRIX[v]))
def test_random_numbers(library, i: int, executor: str):
    kind, arriving, prologue, offset = variant(i + 1)
    a = arguments(MATRIX[i], DTYPES[kind], arriving, prologue, exact=False, seed=i)._replace(need_input=False)
    got = Problem(a, kind, offset).run(library, executors(DTYPES[kind], i)[executor])
    peer = (tf32_peer(a) if kind == "tf32" else reference.backward(*a))[1]
    assert_parity(got, peer, truth_of(a), "grad_weight")


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("arriving", ARRIVING, ids=lambda a: "".join("yn"[not flag] for flag in a))
def test_every_combination_of_gradients(library, arriving, prologue):
    """With and without a factor of grad_y, which is dropped where none arrives."""
    for shape, dtype in ((SHAPES[26], torch.float16), (WIDE[0], torch.bfloat16)):
        a = arguments(shape, dtype, arriving, prologue)
        factor = torch.randint(-2, 3, (shape.k,), generator=torch.Generator().manual_seed(1)).float()
        for b in (a, a._replace(factor=factor)):
            got = Problem(b).run(library, cuda.Fibers(1))
            assert_exact(got, b if arriving[0] else a)


@pytest.mark.parametrize("shape", (SHAPES[14], WIDE[0]), ids=str)
def test_every_schedule_gives_the_same_bits(library, shape):
    for kind, dtype in DTYPES.items():
        problem = Problem(arguments(shape, dtype, exact=False), kind)
        first = problem.run(library, cuda.Fibers(0)).clone()
        assert all(torch.equal(first, problem.run(library, executor)) for executor in cuda.fibers()[1:])


def test_pixels_past_the_end_count_nothing(library):
    """grad_mean alone would be infinite in 16 bits, and no real pixel has it alone."""
    a = arguments(Shape(1, 40, 5, 5, 16, 1, 1), torch.float16, (True, True, False), "relu")
    a = a._replace(grad_y=torch.full_like(a.y, 65000.0), grad_mean=torch.full((16,), -70000.0 * 25))
    for offset in (0, 1):
        got = Problem(a, offset=offset).run(library, cuda.Fibers(2))
        assert_parity(got, reference.backward(*a)[1], truth_of(a))


@pytest.mark.parametrize("kind", DTYPES)
def test_nan_and_infinity(library, kind):
    """They reach what they have a share in, and nothing else."""
    a = arguments(WIDE[0], DTYPES[kind], (True, False, False), "none", seed=5)
    x, grad = a.x.clone(), a.grad_y.clone()
    x[0, 3, 4, 4], x[1, 30, 0, 0], grad[0, 5, 2, 3] = float("nan"), float("inf"), float("nan")
    a = a._replace(x=x, grad_y=grad)
    for offset in (0, 1):
        got, want = Problem(a, kind, offset).run(library, cuda.Fibers(0)), truth_of(a).to(x.dtype)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[~got.isnan()], want[~want.isnan()])


def test_splits_cover_all_steps_in_a_bounded_workspace():
    """As users have them: nothing replaced."""
    library = build(flags=("-DFASTRES_FEW",))
    sizes = itertools.product((3, 64, 256, 2048), (64, 512), (7, 56, 224), (1, 256), (1, 3), FILES)
    for c, k, size, n, r, dtype in sizes:
        geometry = Geometry(n, c, size, size, k, size, size, r, r, 1, 1, r // 2, r // 2, 1, 1)
        struct = ConvBackward(TYPES[dtype], 1, geometry, 256, 256)
        struct.x = 256
        problem = Problem.__new__(Problem)
        problem.struct = struct
        plan, elements = problem.plan(library), k * c * r * r
        assert (plan["splits"] - 1) * plan["each"] < plan["steps"] <= plan["splits"] * plan["each"]
        assert plan["splits"] == 1 or plan["each"] >= 8
        assert library.call("workspace", struct) == (plan["splits"] > 1) * plan["splits"] * elements
        assert plan["splits"] == 1 or 4 * plan["splits"] * elements <= 64 * 2**20
        blocks = plan["row_tiles"] * plan["column_tiles"] * plan["splits"]
        assert plan["splits"] == 1 or blocks <= 512
    got = Problem(a := arguments(WIDE[10], torch.float16))
    assert got.plan(library)["splits"] == 4
    assert_exact(got.run(library, cuda.Fibers(3)), a)


def test_divisions_by_multiplication(library):
    for divisor in (1, 2, 3, 5, 7, 14, 56, 112, 127, 224, 641, 65535, 65537, 2**30 - 1, 2**30, 2**31 - 1):
        for n in {
            0,
            1,
            divisor - 1,
            divisor,
            2 * divisor - 1,
            2**31 - 1,
            2**31 - 2,
            (2**31 - 1) // divisor * divisor - 1,
        }:
            if 0 <= n < 2**31:
                assert library.call("quotient", n, divisor, result=ctypes.c_uint32) == n // divisor, (n, divisor)


@pytest.mark.parametrize("offset", (0, 1), ids=("wide", "flat"))
def test_offsets_past_2_to_the_31(library, offset):
    """An input of 2.56e9 elements, of which a stride reads four pixels: the rest of the memory is reserved only."""
    a = arguments(Shape(1, 64, 2, 2, 8, 1, 1), torch.float16)
    height, width, c = 1000, 40000, 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE
    room = mmap.mmap(-1, 2 * (height * width * c + offset), flags=flags)
    x = torch.frombuffer(room, dtype=torch.float16)[offset:].view(1, height, width, c)
    x[:, :: height - 1, :: width - 1] = a.x.permute(0, 2, 3, 1)
    problem = Problem(a)
    shape = problem.struct.shape
    shape.height, shape.width, shape.stride_h, shape.stride_w = height, width, height - 1, width - 1
    problem.struct.x = pointer(x)
    assert problem.plan(library)["flat"] == offset
    assert_exact(problem.run(library, cuda.Fibers(0)), a)


class Counting:
    """Runs PTX; ``traffic``: of each launch by its kernel, the bytes of each tensor that were read and written, once each."""

    def __init__(self, text: str) -> None:
        self.text, self.traffic = text, {}

    def execute(self, library, function, problem, tensors) -> None:
        for launch in library.record(function, problem):
            memory = GuardedMemory(tensors)
            run_ptx(
                self.text, memory, launch.grid, launch.block[0], launch.shared, list(launch.values), entry=launch.name
            )
            seen = memory.traffic()
            name = "sum" if "sum_splits" in launch.name else "product"
            self.traffic[name] = [
                {k: v for k, v in part.items() if v} for part in (seen.unique_loaded, seen.unique_stored)
            ]


@pytest.mark.parametrize("arriving", ((True, True, True), (True, False, False)), ids=("statistics", "plain"))
@pytest.mark.parametrize("shape", (WIDE[0], WIDE[5], SHAPES[14]), ids=str)
def test_every_byte_is_in_the_formulas(library, shape, arriving):
    """README.md's table against the interpreter's count; channel vectors aside."""
    a = arguments(shape, torch.float16, arriving)
    problem, executor = Problem(a), Counting(ptx(torch.float16))
    problem.run(library, executor)
    splits = problem.plan(library)["splits"]
    x, y, weight = (2 * t.numel() for t in (a.x, a.y, a.weight))
    seen = 2 * a.y.numel() // shape.k * shape.c if (shape.r, shape.s) == (1, 1) else x
    gradient = {"grad_y": y, **({"y": y} if arriving[2] else {})}
    vectors = {"mean", "grad_mean", "grad_var", "scale", "center", "shift"}
    slabs = {"workspace": 2 * splits * weight}
    loaded, stored = executor.traffic.pop("product")
    assert {k: v for k, v in loaded.items() if k not in vectors} == {**gradient, "x": seen}
    assert stored == (slabs if splits > 1 else {"grad_weight": weight})
    assert executor.traffic == ({"sum": [slabs, {"grad_weight": weight}]} if splits > 1 else {})


OPERANDS, KERNEL = "conv_stats/cuda_weight_operands.cuh", "conv_stats/cuda_weight_gradient.cuh"
LAUNCH = "conv_stats/cuda_weight_gradient_launch.cuh"
BROKEN = {
    "a pixel too many": (LAUNCH, "static_cast<uint32_t>(rows_out(g))", "static_cast<uint32_t>(rows_out(g) + 1)"),
    "a pixel too few": (LAUNCH, "static_cast<uint32_t>(rows_out(g))", "static_cast<uint32_t>(rows_out(g) - 1)"),
    "no padding mask": (OPERANDS, "return rows[pixel].has(tap_h, tap_w); });", "return rows != nullptr && pixel >= 0; });"),
    "the mask of another step": (OPERANDS, "void next() { advance(&now); }", "void next() {}"),
    "the mask of another tap": (OPERANDS, "tap_h = p.r, tap_w = p.s", "tap_h = p.s, tap_w = p.r"),
    "no mask of pixels past the end": (OPERANDS, "return now + pixel < total;", "return pixel >= 0;"),
    "the first split": (KERNEL, "int split = 0; split < s.splits", "int split = 1; split < s.splits"),
    "the last split": (KERNEL, "split < s.splits;", "split + 1 < s.splits;"),
    "a split's last step": (KERNEL, "first_step : launch.each;", "first_step : launch.each - 1;"),
    "taps transposed": (KERNEL, "tap / g.filter_width * g.dilation_h", "tap % g.filter_width * g.dilation_h"),
    "taps transposed, flat": (OPERANDS, "p.r) * map.h.step * map.w.size + p.s", "p.s) * map.h.step * map.w.size + p.r"),
    "another filter's vectors": (OPERANDS, "vectors.of[r * per + k]", "vectors.of[r]"),
    "another channel's vectors": (OPERANDS, "transform.vectors[n][p.c + e]", "transform.vectors[n][p.c]"),
    "another channel's vectors, narrow": (OPERANDS, "vectors.of[k]), place", "vectors.of[0]), place"),
    "the second map's pixels": (OPERANDS, "own(shared + kBytes, pixel)", "own(shared + kBytes, pixel ^ 1)"),
    "a copy that is left as it is": (OPERANDS, "*place = a;", "if (i > 0) *place = a;"),
    "columns past the end": (KERNEL, "column >= columns", "column > columns"),
    "a table too few": (OPERANDS, "kTables = Tile::kStages;", "kTables = Tile::kStages - 1;"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_seen(what: str):
    library = build(*SMALL, BROKEN[what], flags=("-DFASTRES_FEW",))
    shapes = (
        Shape(2, 40, 7, 9, 21, 3, 3, (2, 2), (1, 1)), WIDE[0], SHAPES[14], Shape(1, 40, 9, 9, 24, 1, 1),
        Shape(2, 20, 7, 9, 12, 3, 3, (1, 1), (1, 1)),
    )  # fmt: skip
    with pytest.raises((AssertionError, EmulationError)):
        test_pixels_past_the_end_count_nothing(library)
        for shape in shapes:
            a = arguments(shape, torch.float16)
            for seed in range(4):
                assert_exact(Problem(a).run(library, cuda.Fibers(seed)), a)


@pytest.mark.parametrize("sanitizer", ("thread", "address"))
def test_sanitizers_find_nothing(sanitizer):
    """Copies of 16, 8 and 2 bytes, with several splits."""
    library = build(*SMALL, flags=("-DFASTRES_FEW",))
    for shape in (WIDE[0], SHAPES[14], Shape(2, 20, 7, 9, 12, 3, 3, (1, 1), (1, 1))):
        a = arguments(shape, torch.float16)
        assert_exact(Problem(a).run(library, Sanitized(sanitizer)), a)


def test_a_removed_barrier_or_wait_is_seen(library):
    """In the PTX of one kernel."""
    a = arguments(Shape(2, 40, 8, 8, 48, 1, 1), torch.float16)
    problem, whole = Problem(a), ptx(torch.float16)
    assert_exact(problem.run(library, cuda.Ptx(whole)), a)
    name = library.record("weight_gradient", problem.struct)[0].name
    start = whole.index(f".entry {name}(")
    end = whole.index("\n}", start)
    # The wait after the loop is left out: no copies are under way there any more.
    places = list(re.finditer(r"(bar(rier)?\.(cta\.)?sync|cp\.async\.wait_group 1)[^;]*;", whole[start:end]))
    assert len(places) == 5
    for found in places:
        text = whole[: start + found.start()] + whole[start + found.end() :]
        with pytest.raises(SharedMemoryRace):
            problem.run(library, cuda.Ptx(text))
