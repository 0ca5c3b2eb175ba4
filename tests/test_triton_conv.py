"""The Triton convolution forward in both ops: 42 shapes, four precisions, as source and as compiled PTX."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from emulation.errors import EmulationError
from emulation.ptx import ptx_executor
from emulation.triton_interpreter import interpreter_executor
from parity import assert_parity
from torch import Tensor
from triton_conv_cases import EMPTY, KINDS, SHAPES, Case, Inputs, cut, integers, normals, peer_of, truth_of

from fastres.errors import BackendError
from fastres.kernels.common import triton_conv
from fastres.kernels.common.layout import memory_format_of
from fastres.kernels.common.triton_conv import ConvProblem
from fastres.kernels.common.triton_launch import Config, Launch, executing_with
from fastres.kernels.conv import triton_forward, triton_run
from fastres.kernels.conv_act import reference as act_reference
from fastres.kernels.conv_act import triton_backend as conv_act
from fastres.kernels.conv_stats import reference as stats_reference
from fastres.kernels.conv_stats import triton_backend as conv_stats

EXECUTORS = {"source": interpreter_executor, "ptx": ptx_executor}
executors = pytest.mark.parametrize("executor", EXECUTORS)
shapes = pytest.mark.parametrize("index", range(len(SHAPES)), ids=[str(case) for case in SHAPES])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Whatever a kernel should have written and did not is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def precision(kind: str) -> Iterator[None]:
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def run_stats(case: Case, inputs: Inputs, kind: str, executor: str, config: Config | None = None) -> list[Tensor]:
    """(y, mean, var) by our kernels; a configuration other than the default goes past the op."""
    with precision(kind), executing_with(EXECUTORS[executor]()):
        if config is None:
            return list(
                conv_stats.forward(inputs.x, inputs.weight, *inputs.vectors, inputs.relu, *case.geometry, stats=True)
            )
        problem = ConvProblem.of(
            inputs.x, inputs.weight, *case.geometry[:3], inputs.vectors[0], inputs.relu, stats=True
        )
        return list(triton_run.convolution(problem, inputs.x, inputs.weight, inputs.vectors, config=config))


def assert_exact(case: Case, kind: str, results: list[Tensor], inputs: Inputs) -> None:
    """y bit for bit; the statistics, which divide, to a few units in the last place."""
    y, mean, var = truth_of(case, inputs)
    assert results[0].dtype == inputs.x.dtype and results[0].shape == y.shape
    y = y.to(inputs.x.dtype)
    assert torch.equal(results[0], y), f"{int((results[0] != y).sum())} of {y.numel()} elements differ"
    stored = y.double()
    mean, var = stored.mean((0, 2, 3)), stored.var((0, 2, 3), correction=0)
    torch.testing.assert_close(results[1].double(), mean, rtol=1e-6, atol=1e-6 * float(stored.abs().max()))
    torch.testing.assert_close(results[2].double(), var, rtol=4e-6, atol=1e-6)


@executors
@shapes
def test_exact(index: int, executor: str) -> None:
    """Integers: no index, mask or padding can hide in a tolerance."""
    case, kind = SHAPES[index], KINDS[index % 4]
    inputs = integers(case, kind)
    assert_exact(case, kind, run_stats(case, inputs, kind, executor), inputs)


@executors
@shapes
def test_random(index: int, executor: str) -> None:
    """The tolerance rule: as source in two more precisions, as PTX in the one that the exact test compiled."""
    case = SHAPES[index]
    for offset in (1, 2) if executor == "source" else (0,):
        kind = KINDS[(index + offset) % 4]
        inputs = normals(case, kind, index)
        names = ("y", "mean", "var")
        ours = run_stats(case, inputs, kind, executor)
        for name, own, peer, truth in zip(
            names, ours, peer_of(case, inputs, kind), truth_of(case, inputs), strict=True
        ):
            assert_parity(own, peer, truth, f"{name} ({kind})")


@executors
@shapes
def test_conv_act(index: int, executor: str) -> None:
    """Bias, residual and ReLU, each present in turn: integers bit for bit, and the rule."""
    case, kind = SHAPES[index], KINDS[(index + 3) % 4]
    relu, with_bias, with_residual = index % 2 == 0, index % 3 != 0, index % 5 != 0
    for inputs in (integers(case, kind), normals(case, kind, index)):
        x, weight = inputs.x, inputs.weight
        bias, residual = inputs.bias if with_bias else None, inputs.residual if with_residual else None
        with precision(kind), executing_with(EXECUTORS[executor]()):
            out = conv_act.forward(x, weight, bias, residual, relu, *case.geometry)
        rest = (
            None if bias is None else bias.double(),
            None if residual is None else residual.double(),
            relu,
            *case.geometry,
        )
        truth = act_reference.forward(x.double(), weight.double(), *rest)
        if torch.equal(x, x.round()):
            assert torch.equal(out, truth.to(x.dtype))
        operands = (cut(x), cut(weight)) if kind == "tf32" else (x, weight)
        peer = act_reference.forward(*operands, bias, residual, relu, *case.geometry)
        assert_parity(out, peer, truth, kind)
        assert out.is_contiguous(memory_format=memory_format_of(x))


SEVERAL_TILES = Case(2, 8, 12, 13, 140, 3, 3, padding=(1, 1))


@executors
@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration(kind: str, executor: str) -> None:
    """Every configuration that the tuner may take, with several tiles of rows and columns (as PTX one product a dtype)."""
    cases = (SEVERAL_TILES, Case(1, 40, 9, 15, 70, 1, 1), Case(1, 3, 16, 17, 70, 5, 5, (2, 2), (2, 2)))
    for case in cases if executor == "source" else (cases[KINDS.index(kind) % 3],):
        inputs = integers(case, kind)
        with precision(kind):
            problem = ConvProblem.of(inputs.x, inputs.weight, *case.geometry[:3], inputs.vectors[0], True)
        spaces = [triton_run.configurations(problem, capability) for capability in ((8, 0), (10, 0), (12, 0))]
        assert all(0 < len(space) <= 8 for space in spaces) and spaces[0][0] == triton_run.default_config(problem)
        configurations = dict.fromkeys(c for space in spaces for c in space if not c["TMA"])
        for config in configurations:
            assert_exact(case, kind, run_stats(case, inputs, kind, executor, config), inputs)


TMA_SHAPES = (
    Case(2, 24, 7, 9, 24, 1, 1),
    Case(1, 40, 12, 13, 70, 1, 1, prologue=False),
    Case(2, 24, 7, 9, 40, 3, 3, padding=(1, 1)),
    Case(1, 72, 17, 9, 20, 3, 3, padding=(1, 1)),
    Case(1, 24, 9, 35, 20, 3, 3, padding=(2, 1), dilation=(2, 1)),
    Case(2, 32, 6, 6, 17, 5, 5, padding=(2, 2), prologue=False),
    Case(1, 32, 5, 40, 8, 1, 3, padding=(0, 1)),
    Case(3, 32, 4, 4, 8, 1, 1, padding=(1, 1)),
)


@pytest.mark.parametrize("case", TMA_SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_tensor_descriptors(case: Case, kind: str) -> None:
    """The same body with descriptors, as source: compiled and checked statically for sm_90 and newer, not executed."""
    inputs = integers(case, kind)
    problem = ConvProblem.of(inputs.x, inputs.weight, *case.geometry[:3], inputs.vectors[0], inputs.relu)
    configs = [c for c in triton_run.configurations(problem, (9, 0)) if c["TMA"]]
    assert configs and not any(c["TMA"] for c in triton_run.configurations(problem))
    assert not triton_run.default_config(problem, (9, 0))["TMA"]
    for config in configs:
        assert_exact(case, kind, run_stats(case, inputs, kind, "source", config), inputs)


def test_descriptors_are_refused() -> None:
    """Strides, pixels that are no multiple of 16 bytes, float32, and nothing to describe."""
    for problem in (
        ConvProblem(1, 16, 8, 8, 8, 3, 3, stride=(2, 1)),
        ConvProblem(1, 12, 8, 8, 8, 3, 3),
        ConvProblem(1, 16, 8, 8, 8, 3, 3, dtype=torch.float32),
        ConvProblem(0, 16, 8, 8, 8, 1, 1),
    ):
        assert not any(c["TMA"] for c in triton_run.configurations(problem, (10, 0)))


@executors
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, executor: str) -> None:
    inputs = integers(EMPTY, kind)
    y, mean, var = run_stats(EMPTY, inputs, kind, executor)
    assert y.shape == (0, 8, 6, 6) and mean.isnan().all() and var.isnan().all() and mean.shape == var.shape == (8,)
    with executing_with(EXECUTORS[executor]()):
        out = conv_act.forward(inputs.x, inputs.weight, inputs.bias, inputs.residual, True, *EMPTY.geometry)
    assert out.shape == (0, 8, 6, 6)


def test_results_follow_the_layout_of_the_input() -> None:
    for layout, expected in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        case = Case(2, 8, 5, 6, 12, 3, 3, padding=(1, 1), layout=layout)
        inputs = integers(case, "fp16")
        assert run_stats(case, inputs, "fp16", "source")[0].is_contiguous(memory_format=expected)
    assert [t.numel() for t in _forward(case, inputs, stats=False)[1:]] == [0, 0]


def _forward(case: Case, inputs: Inputs, stats: bool) -> tuple[Tensor, ...]:
    with executing_with(interpreter_executor()):
        return conv_stats.forward(inputs.x, inputs.weight, *inputs.vectors, inputs.relu, *case.geometry, stats)


def test_expanded_and_strided_vectors() -> None:
    case = Case(2, 8, 5, 6, 12, 3, 3, padding=(1, 1))
    given = integers(case, "fp16")
    two, strided = torch.tensor([2.0]).expand(8), torch.arange(24.0)[::2]
    inputs = Inputs(given.x, given.weight, (two, torch.arange(16.0)[::2], two), True, strided, given.residual)
    assert_exact(case, "fp16", run_stats(case, inputs, "fp16", "source"), inputs)
    with executing_with(interpreter_executor()):
        out = conv_act.forward(inputs.x, inputs.weight, strided, None, False, *case.geometry)
    assert torch.equal(out, act_reference.forward(inputs.x, inputs.weight, strided, None, False, *case.geometry))


def test_groups_and_refusals() -> None:
    case = Case(2, 8, 5, 6, 12, 3, 3, padding=(1, 1))
    inputs = integers(case, "fp32")
    weight, geometry = inputs.weight[:, :2], (*case.geometry[:3], 4)
    with executing_with(interpreter_executor()):
        y, mean, var = conv_stats.forward(inputs.x, weight, *inputs.vectors, True, *geometry, True)
        out = conv_act.forward(inputs.x, weight, inputs.bias, None, True, *geometry)
        with pytest.raises(BackendError, match="float64"):
            conv_stats.forward(inputs.x.double(), weight.double(), None, None, None, False, *geometry, True)
    plain = Inputs(inputs.x, weight, inputs.vectors, True, inputs.bias, inputs.residual)
    truth = stats_reference.forward(
        plain.x.double(), weight.double(), *(v.double() for v in plain.vectors), True, *geometry, True
    )
    assert torch.equal(y.double(), truth[0])
    torch.testing.assert_close([mean.double(), var.double()], list(truth[1:]), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, act_reference.forward(plain.x, weight, plain.bias, None, True, *geometry))


@executors
def test_statistics_far_from_zero(executor: str) -> None:
    """|mean| of a thousand standard deviations, and enough row tiles for two merges."""
    case, kind = Case(130, 16, 8, 8, 4, 1, 1, prologue=False), "fp32"
    x = torch.randn(case.n, case.c, case.h, case.w, generator=torch.Generator().manual_seed(0)) + 1000
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.full((case.k, case.c, 1, 1), 1 / 16)
    inputs = Inputs(x, weight, (None, None, None), False, torch.empty(0), torch.empty(0))
    assert triton_run.row_tiles(ConvProblem.of(x, weight, *case.geometry[:3], None, False), _config()) > 128
    y, mean, var = run_stats(case, inputs, kind, executor, _config())
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=3e-7, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


def _config(m: int = 64, n: int = 64, k: int = 16, warps: int = 8, stages: int = 2) -> Config:
    return triton_run._tile(m, n, k, warps, stages)


def test_nan_and_infinity_stay_where_they_are() -> None:
    """A NaN in x reaches the windows that hold it and no others; infinite coefficients don't leak out of padding."""
    case = Case(1, 8, 6, 6, 8, 3, 3, padding=(1, 1))
    inputs = integers(case, "fp32")
    inputs.x[0, 3, 2, 2] = float("nan")
    inputs.weight[:, 3] = 1.0
    y = _forward(case, inputs, stats=False)[0]
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(y.isnan().all(1)[0], expected) and torch.equal(y.isnan().any(1)[0], expected)


@pytest.mark.parametrize(
    "case", [SEVERAL_TILES, Case(1, 40, 9, 15, 70, 1, 1), Case(2, 16, 7, 7, 24, 1, 1, (2, 2))], ids=str
)
def test_bytes(case: Case) -> None:
    """The formulas of kernels/conv_stats/README.md: what is read and written at least once, and the partial statistics."""
    inputs = integers(case, "fp16")
    with executing_with(interpreter := interpreter_executor()):
        y, _, _ = conv_stats.forward(inputs.x, inputs.weight, *inputs.vectors, True, *case.geometry, True)
    problem = ConvProblem.of(inputs.x, inputs.weight, *case.geometry[:3], inputs.vectors[0], True)
    tiles = triton_run.row_tiles(problem, triton_run.default_config(problem))
    product, merge = interpreter.record
    read = problem.rows_in if case.stride == (1, 1) else problem.rows_out  # a strided 1x1 skips pixels
    assert product.unique_loaded["x"] == 2 * read * case.c
    assert product.unique_loaded["weight"] == 2 * inputs.weight.numel()
    assert product.stored["y"] == 2 * y.numel()
    assert product.stored["partial"] + product.stored["counts"] == 4 * tiles * (2 * case.k + 1)
    assert merge.loaded["partial"] <= 4 * (tiles + 1) * 2 * case.k and merge.stored["mean"] == 4 * case.k


# ---- int64 offsets ----


@triton.jit
def _locate(out, tile, N, P, Q, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """out [5, BLOCK] int64: row, image, p, q and existence of a tile's rows."""
    row, image, p, q, exists = triton_forward.output_rows(tile, N, P, Q, PATCH_H, PATCH_W, BLOCK, INT64)
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, row.to(tl.int64))
    tl.store(out + BLOCK + lane, (image + lane * 0).to(tl.int64))
    tl.store(out + 2 * BLOCK + lane, p.to(tl.int64))
    tl.store(out + 3 * BLOCK + lane, q.to(tl.int64))
    tl.store(out + 4 * BLOCK + lane, exists.to(tl.int64))


@pytest.mark.parametrize("patch", [(0, 0), (8, 8)], ids=["rows", "patches"])
def test_index_maths_beyond_two_billion(patch: tuple[int, int]) -> None:
    """Rows of a map of 3·10^9 elements and more, without the map."""
    n, p, q, block = 70_001, 211, 205, 64
    problem = ConvProblem(n, 1, p, q, 64, 1, 1)
    assert problem.rows_out > 2**31 and problem.int64
    per_image = triton.cdiv(p, 8) * triton.cdiv(q, 8)
    last = n * per_image - 1 if patch[0] else problem.rows_out // block
    for tile in (0, 17, last // 2, last):
        out = torch.empty(5, block, dtype=torch.int64)
        constants = {"PATCH_H": patch[0], "PATCH_W": patch[1], "BLOCK": block, "INT64": True}
        launch = Launch(_locate, (1,), {"out": out, "tile": tile, "N": n, "P": p, "Q": q}, constants)
        with executing_with(interpreter_executor()):
            launch.run()
        for lane in range(block):
            row, image, y, x, exists = out[:, lane].tolist()
            if patch[0]:
                i, inner = divmod(tile, per_image)
                a, b = divmod(inner, triton.cdiv(q, 8))
                expected = (i, a * 8 + lane // 8, b * 8 + lane % 8)
                assert (image, y, x) == expected and exists == (y < p and x < q)
                assert row == (i * p + y) * q + x
            else:
                assert row == tile * block + lane and exists == (row < problem.rows_out)
                assert (image, y, x) == (row // (p * q), row // q % p, row % q)


def test_when_offsets_are_int64() -> None:
    limit = triton_conv.INT32_ELEMENTS
    assert not ConvProblem(1, 1, 1, limit, 1, 1, 1).int64
    assert ConvProblem(1, 1, 1, limit + 1, 1, 1, 1).int64
    assert ConvProblem(256, 64, 56, 56, 4096, 1, 1).int64  # only y is large
    assert ConvProblem(1, 32768, 1, 1, 65536, 1, 1).int64  # only the weights are
    assert not ConvProblem(256, 64, 56, 56, 256, 1, 1).int64


@executors
@pytest.mark.parametrize("case", [SHAPES[4], SHAPES[6], SHAPES[15], SHAPES[30], SHAPES[39]], ids=str)
def test_int64_kernels(case: Case, executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_conv, "INT32_ELEMENTS", 0)
    inputs = integers(case, "fp16")
    assert_exact(case, "fp16", run_stats(case, inputs, "fp16", executor), inputs)


# ---- kernels that are wrong on purpose ----

MUTATIONS = {
    "padding before the prologue": ("z = tl.where(in_image[:, None], z, 0.0)", "z = z"),
    "a channel too many": ("c_exists = c < C\n", "c_exists = c <= C\n"),
    "a row too many": ("row < as_index(N, INT64) * P * Q", "row <= as_index(N, INT64) * P * Q"),
    "an output channel too many": ("k_exists = k < K\n", "k_exists = k <= K\n"),
    "taps transposed": ("tap // S, tap % S", "tap % S, tap // S"),
    "no dilation": ("h0 + r * DILATION_H, w0", "h0 + r, w0"),
    "a step too few": ("tl.cdiv(C, BLOCK_K) * TAPS", "tl.cdiv(C, BLOCK_K) * TAPS - 1"),
    "statistics of missing rows": ("rounded.to(tl.float32), row_exists", "rounded.to(tl.float32), row >= 0"),
    "a tile without statistics": ("mask=tile_n == 0)", "mask=(tile_n == 0) & (tile_m > 0))"),
    "a tile not merged": ("tile < TILES, other", "tile < TILES - 1, other"),
    "M2 without the means' distances": ("m2 + weight * apart * apart", "m2"),
}


def _mutated(old: str, new: str, folder: Path) -> object:
    source = Path(triton_forward.__file__).read_text()
    assert source.count(old) >= 1, old
    source = re.sub(r"from \.\.common", "from fastres.kernels.common", source.replace(old, new))
    path = folder / "mutated.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_kernels_are_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 17, 7, 9, 70, 3, 2, padding=(2, 1), dilation=(2, 1))
    inputs = integers(case, "fp16")
    assert_exact(case, "fp16", run_stats(case, inputs, "fp16", "source", _config(k=32)), inputs)
    module = _mutated(*MUTATIONS[name], tmp_path)
    for kernel in ("conv_forward", "merge_statistics"):
        monkeypatch.setattr(triton_run, kernel, getattr(module, kernel))
    with pytest.raises((AssertionError, EmulationError)):
        assert_exact(case, "fp16", run_stats(case, inputs, "fp16", "source", _config(k=32)), inputs)
