"""The Triton gradients of conv_stats against the reference: exact integers bit for bit, random numbers by the rule."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from emulation.compiling import ARCHITECTURES, compile_launch
from emulation.errors import EmulationError
from emulation.ptx import ptx_executor
from emulation.triton_interpreter import interpreter_executor
from gradient_cases import ARRIVING, DTYPES, PROLOGUES, SHAPES, Arguments, Shape, arguments, tf32_peer
from parity import SLACK, assert_parity, error_of, floor_of
from torch import Tensor
from triton_cases import whole_numbers, whole_vectors

from fastres.errors import BackendError
from fastres.kernels.common.layout import empty_like
from fastres.kernels.common.triton_conv import ConvProblem
from fastres.kernels.common.triton_launch import Config, Launch, executing_with
from fastres.kernels.conv_stats import library, native, reference, triton_gradients
from fastres.kernels.conv_stats import triton_input_gradient as of_input
from fastres.kernels.conv_stats import triton_weight_gradient as of_weight

NAMES = ("grad_x", "grad_weight", "grad_scale", "grad_shift")
EXECUTORS = {"interpreter": interpreter_executor, "ptx": ptx_executor}
# Several tiles along every axis, and several splits, of maps as small as these
SMALL_INPUT = Config.of(num_warps=4, num_stages=2, BLOCK_M=32, BLOCK_N=16, BLOCK_K=16)
SMALL_WEIGHT = Config.of(num_warps=4, num_stages=2, BLOCK_M=16, BLOCK_N=32, BLOCK_P=16)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(of_input, "default_config", lambda problem: SMALL_INPUT)
    monkeypatch.setattr(of_weight, "default_config", lambda problem: SMALL_WEIGHT)
    monkeypatch.setattr(of_weight, "FEWEST_STEPS", 1)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN: results and workspaces that a kernel leaves out show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def backward(a: Arguments, precision: str = "ieee", executor=None) -> tuple[Tensor, ...]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        with executing_with(executor or interpreter_executor()):
            return triton_gradients.backward(*a)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def precision_of(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def assert_exact(ours: tuple[Tensor, ...], a: Arguments) -> None:
    """Equal to the truth, rounded once, bit for bit (either sign of zero); in the promised dtypes and layouts."""
    truth, peer = reference.backward(*a.double()), reference.backward(*a)
    for name, got, want, like in zip(NAMES, ours, truth, peer, strict=True):
        assert got.shape == want.shape and got.dtype == like.dtype, name
        assert torch.equal(got, want.to(got.dtype)), f"{name}: {(got.double() - want).abs().max()} off"
    for got, like in zip(ours[:2], (a.x, a.weight), strict=True):
        strides = zip(got.shape, got.stride(), empty_like(like).stride(), strict=False)
        assert not got.numel() or all(size == 1 or stride == other for size, stride, other in strides)


def variant(i: int) -> tuple[str, tuple[bool, ...], str, str]:
    """Shape i's dtype, arriving gradients, prologue and layout: all of them occur, each with several of the others."""
    layouts = ("channels_last", "contiguous", "offset", "channel_slice")
    return tuple(DTYPES)[i % 4], ARRIVING[i % 7 if i % 3 else 0], PROLOGUES[(i // 2) % 3], layouts[(i // 3) % 4]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("i", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))
def test_exact_integers(i: int, executor: str, small_blocks):
    kind, arriving, prologue, layout = variant(i)
    a = arguments(SHAPES[i], DTYPES[kind], arriving, prologue, layout, seed=i)
    assert_exact(backward(a, precision_of(kind), EXECUTORS[executor]()), a)


RANDOM = [(i, "interpreter") for i in range(len(SHAPES))] + [(i, "ptx") for i in range(0, len(SHAPES), 3)]


@pytest.mark.parametrize(("i", "executor"), RANDOM, ids=lambda v: v if isinstance(v, str) else str(SHAPES[v]))
def test_random_numbers(i: int, executor: str):
    kind, arriving, prologue, layout = variant(i + 1)
    a = arguments(SHAPES[i], DTYPES[kind], arriving, prologue, layout, exact=False, seed=i)
    ours = backward(a, precision_of(kind), EXECUTORS[executor]())
    peer_of = tf32_peer if kind == "tf32" else lambda b: reference.backward(*b)
    truth, peer = reference.backward(*a.double()), peer_of(a)
    for name, got, other, true in zip(NAMES[:2], ours, peer, truth, strict=False):
        assert_parity(got, other, true, name)
    # The sums are a few numbers, and how wrong the peer is in a few numbers is chance: its worst of some draws counts.
    worst = [0.0, 0.0]
    for seed in range(4):
        b = arguments(SHAPES[i], DTYPES[kind], arriving, prologue, layout, exact=False, seed=100 * seed + i)
        for j, (other, true) in enumerate(zip(peer_of(b)[2:], reference.backward(*b.double())[2:], strict=True)):
            if true.any():
                worst[j] = max(worst[j], error_of(other, true, "max") / true.abs().max().item())
    for name, got, true, relative in zip(NAMES[2:], ours[2:], truth[2:], worst, strict=True):
        allowed = SLACK * relative * true.abs().max().item() if true.numel() else 0.0
        assert got.shape == true.shape and error_of(got, true, "max") <= allowed + floor_of(true, got.dtype), name


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("arriving", ARRIVING, ids=lambda a: "".join("yn"[not flag] for flag in a))
def test_every_combination_of_gradients(arriving, prologue):
    for shape, dtype in ((SHAPES[26], torch.float16), (SHAPES[14], torch.bfloat16)):
        a = arguments(shape, dtype, arriving, prologue)
        assert_exact(backward(a), a)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("i", range(0, len(SHAPES), 5), ids=lambda i: str(SHAPES[i]))
def test_an_addend_and_a_factor(i: int, executor: str, small_blocks):
    """Another gradient of x, added as it is stored; a factor a channel of grad_y, applied as it is read; in any layout."""
    kind, arriving, prologue, layout = variant(i)
    for j, (adds, scales) in enumerate(((True, False), (False, True), (True, True))):
        if j != i % 3 and executor == "ptx":
            continue  # each of the three by a third of the shapes
        a = arguments(SHAPES[i], DTYPES[kind], arriving, prologue, layout, seed=i)
        addend = whole_numbers(tuple(a.x.shape), a.x.dtype, layout, seed=i + 1)
        factor = whole_vectors(SHAPES[i].k, seed=i)[0]
        a = a._replace(addend=addend if adds else None, factor=factor if scales else None)
        assert_exact(backward(a, precision_of(kind), EXECUTORS[executor]()), a)


@pytest.mark.parametrize("of", (library, native, reference), ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("groups", (1, 2))
def test_other_backends_take_an_addend_and_a_factor(of, groups):
    a = arguments(Shape(2, 8, 5, 5, 6, 3, 3, (1, 1), (1, 1)), torch.float32)
    weight = a.weight[:, : 8 // groups].contiguous()
    addend, factor = whole_numbers((2, 8, 5, 5), torch.float32, "contiguous", 1), whole_vectors(6, 2)[0]
    plain = a._replace(weight=weight, groups=groups, grad_y=a.grad_y * factor.view(-1, 1, 1))
    want = of.backward(*plain)
    got = of.backward(*a._replace(weight=weight, groups=groups, addend=addend, factor=factor))
    assert torch.equal(got[0], want[0] + addend)
    for one, other in zip(got[1:], want[1:], strict=True):
        assert torch.equal(one, other)
    with executing_with(interpreter_executor()):
        ours = triton_gradients.backward(*a._replace(weight=weight, groups=groups, addend=addend, factor=factor))
    assert torch.equal(ours[0], got[0])


@pytest.mark.parametrize("shape", (SHAPES[3], SHAPES[27], SHAPES[40]), ids=str)
def test_every_shipped_configuration_is_exact(shape, monkeypatch):
    for kind, dtype in DTYPES.items():
        a = arguments(shape, dtype)
        problem = problem_of(shape, dtype, precision=precision_of(kind))
        for config in of_input.configurations(problem):
            monkeypatch.setattr(of_input, "default_config", lambda p, c=config: c)
            assert_exact((*backward(a._replace(need_weight=False), precision_of(kind)),), a._replace(need_weight=False))
        for config in of_weight.configurations(problem):
            monkeypatch.setattr(of_weight, "default_config", lambda p, c=config: c)
            assert_exact(backward(a._replace(need_input=False), precision_of(kind)), a._replace(need_input=False))


def test_two_runs_give_the_same_bits(small_blocks):
    a = arguments(Shape(2, 20, 9, 9, 17, 3, 3, (2, 2), (1, 1)), torch.float16, exact=False)
    for first, second in zip(backward(a), backward(a), strict=True):
        assert torch.equal(first, second)


def test_only_what_is_needed_is_launched(small_blocks):
    a = arguments(SHAPES[13], torch.float16)
    names: list[str] = []
    with executing_with(lambda launch: names.append(launch.name)):
        for need_input, need_weight in ((True, False), (False, True), (False, False)):
            triton_gradients.backward(*a._replace(need_input=need_input, need_weight=need_weight))
            names.append("|")
    assert names == [
        "input_gradient_kernel", "merge_sums_kernel", "|", "weight_gradient_kernel", "sum_splits_kernel", "|", "|"
    ]  # fmt: skip


def test_groups_go_to_the_library():
    shape = Shape(2, 8, 5, 5, 6, 3, 3, (1, 1), (1, 1))
    a = arguments(shape, torch.float32)
    a = a._replace(weight=a.weight[:, :4].contiguous(), groups=2)
    for got, want in zip(backward(a), library.backward(*a), strict=True):
        assert torch.equal(got, want)


def test_float64_is_refused():
    with pytest.raises(BackendError, match="float64"):
        backward(arguments(SHAPES[0], torch.float16).double())


def problem_of(shape: Shape, dtype: torch.dtype, prologue=True, precision="ieee") -> ConvProblem:
    n, c, h, w, k, r, s, *conv = shape
    return ConvProblem(n, c, h, w, k, r, s, *conv, dtype, prologue, prologue, precision=precision)


def launches_of(problem: ConvProblem, device="meta", further: bool = False) -> list[Launch]:
    """The launches of a backward pass over tensors without memory; ``further``: with an addend and a factor."""

    def map_(size: tuple[int, ...]) -> Tensor:
        return torch.empty(size, dtype=problem.dtype, device=device, memory_format=torch.channels_last)

    def vector(size: int) -> Tensor:
        return torch.empty(size, device=device)

    vectors = [vector(problem.c) if problem.prologue else None for _ in range(3)]
    y, statistics = map_(problem.y_shape), [vector(problem.k) for _ in range(3)]
    found: list[Launch] = []
    with executing_with(found.append):
        triton_gradients.backward(
            y, *statistics[:2], map_(problem.x_shape), map_(problem.w_shape), y, statistics[2], *vectors,
            problem.relu, problem.stride, problem.padding, problem.dilation, 1, True, True,
            *((map_(problem.x_shape), vector(problem.k)) if further else ()),
        )  # fmt: skip
    return found


@pytest.mark.parametrize("shape", (SHAPES[14], SHAPES[27], SHAPES[2]), ids=str)
def test_int64_addresses_compute_the_same(shape, monkeypatch, small_blocks):
    monkeypatch.setattr(ConvProblem, "int64", True)
    a = arguments(shape, torch.float16)
    assert_exact(backward(a), a)


def test_addresses_are_int64_where_a_tensor_is_huge():
    """No memory: the flag is chosen from sizes, and the kernels compile with it."""
    huge = problem_of(Shape(1024, 256, 128, 128, 64, 3, 3, (1, 1), (1, 1)), torch.float16)
    assert [bool(launch.constants.get("INT64")) for launch in launches_of(huge)] == [True, False, True, False]
    for launch in launches_of(huge):
        assert compile_launch(launch, 80).asm["ptx"]


def test_workspaces_are_bounded():
    for c, k, size, n in itertools.product((3, 64, 2048), (64, 512), (7, 224), (1, 256)):
        problem = problem_of(Shape(n, c, size, size, k, 3, 3, (1, 1), (1, 1)), torch.float16)
        for config in of_weight.configurations(problem):
            splits, blocks = of_weight.splits_of(problem, config)
            total = -(-problem.rows_out // config["BLOCK_P"])
            assert (splits - 1) * blocks < total <= splits * blocks
            assert splits == 1 or 4 * splits * k * c * 9 <= of_weight.WORKSPACE_BYTES


@pytest.mark.parametrize("arriving", ((True, True, True), (True, False, False)), ids=("statistics", "plain"))
@pytest.mark.parametrize("i", (0, 13, 25, 7), ids=lambda i: str(SHAPES[i]))
def test_every_byte_is_in_the_formulas(i: int, arriving, small_blocks):
    """README.md's table against the interpreter's count, each byte once; channel vectors aside."""
    shape, executor = SHAPES[i], interpreter_executor()
    problem = problem_of(shape, torch.float16)
    a = arguments(shape, torch.float16, arriving)
    backward(a, executor=executor)
    x, y, weight = (2 * t.numel() for t in (a.x, a.y, a.weight))
    tiles, splits = of_input.tiles_of(problem, SMALL_INPUT), of_weight.splits_of(problem, SMALL_WEIGHT)[0]
    partials, slabs = tiles * 2 * shape.c * 4, splits * 2 * weight
    seen = 2 * problem.rows_out * shape.c if (shape.r, shape.s) == (1, 1) else x
    gradient = {"grad_y": y, **({"y": y} if arriving[2] else {})}
    expected = {
        "input_gradient_kernel": ({**gradient, "x": x, "weight": weight}, {"grad_x": x, "partials": partials}),
        "merge_sums_kernel": ({"sums": partials}, {"out_0": 4 * shape.c, "out_1": 4 * shape.c}),
        "weight_gradient_kernel": ({**gradient, "x": seen}, {"result": slabs if splits > 1 else weight}),
        "sum_splits_kernel": ({"partials": slabs}, {"grad_weight": weight}),
    }
    vectors = {"mean", "grad_mean", "grad_var", "scale", "center", "shift"}
    for record in executor.record:
        loaded = {k: v for k, v in record.unique_loaded.items() if v and k not in vectors}
        assert (loaded, dict(record.unique_stored)) == expected[record.name], record.name
    assert len(executor.record) == 3 + (splits > 1)


BROKEN = {
    "no padding mask": ("input", "live & inside(p, q, P, Q)", "live"),
    "an off-by-one padding mask": ("input", "inside(p, q, P, Q)", "inside(p, q, P + 1, Q)"),
    "a phase's last row": ("input", "(H - phase_h + STRIDE_H - 1)", "(H - phase_h)"),
    "another phase's tap": ("input", "(first_r + tap_h * STEP_H)", "(tap_h * STEP_H)"),
    "the ReLU's mask": ("input", "d) > 0.0", "d) >= 0.0"),
    "the raw input in the sum": ("input", "(value - b)", "value"),
    "the last channels": ("input", "blocks_k = tl.cdiv(K, BLOCK_K)", "blocks_k = K // BLOCK_K"),
    "a store too few": ("input", "write_part(partials, part, 1,", "write_part(partials, part, 0,"),
    "another tile's sums": ("input", "write_part(partials, part, 1,", "write_part(partials, part // 2, 1,"),
    "padding before the prologue": ("weight", "tl.where(seen, affine_act(", "tl.where(live[:, None], affine_act("),
    "the last split": ("weight", "tl.minimum((split + 1) * blocks, ", "tl.minimum((split + 1) * blocks - 1, "),
    "the first split": ("weight", "in range(0, splits)", "in range(1, splits)"),
    "rows past the end": ("weight", "live = pixel < ROWS", "live = pixel < ROWS + 1"),
    "taps transposed": ("weight", "(tap // S) * DIL_H", "(tap % S) * DIL_H"),
    "columns past the end": ("weight", "live_c = column < R * S * C", "live_c = column < R * S * C + 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_seen(what: str, tmp_path: Path, monkeypatch, small_blocks):
    part, old, new = BROKEN[what]
    module = of_input if part == "input" else of_weight
    source = Path(module.__file__).read_text()
    assert source.count(old) >= 1, "the mutation no longer applies"
    file = tmp_path / "broken.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.broken", file)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(broken, "default_config", module.default_config)
    monkeypatch.setattr(broken, "FEWEST_STEPS", 1, raising=False)
    monkeypatch.setattr(triton_gradients, f"{part}_gradient", getattr(broken, f"{part}_gradient"))
    shapes = (
        Shape(2, 17, 7, 9, 21, 3, 3, (2, 2), (1, 1)), Shape(2, 5, 7, 9, 5, 3, 3, (1, 1), (1, 1)),
        Shape(1, 40, 5, 5, 9, 3, 3, (1, 1), (1, 1)), Shape(12, 4, 9, 9, 4, 1, 1),
    )  # fmt: skip
    with pytest.raises((AssertionError, EmulationError)):
        for shape in shapes:
            a = arguments(shape, torch.float16)
            assert_exact(backward(a), a)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_with_tensor_cores_and_async_copies(arch: int):
    problem = problem_of(Shape(8, 64, 28, 28, 128, 3, 3, (2, 2), (1, 1)), torch.bfloat16)
    product = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}[arch]
    limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) * 1024
    for launch in (*launches_of(problem), *launches_of(problem, further=True)):
        compiled = compile_launch(launch, arch)
        assert compiled.metadata.shared <= limit
        if "gradient" in launch.name:
            assert product in compiled.asm["ptx"] and "cp.async.cg" in compiled.asm["ptx"], launch.name
