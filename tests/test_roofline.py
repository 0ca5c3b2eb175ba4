"""The roofline: limits that this machine really has, steps held against them, what is printed and drawn."""

import pytest
import torch

from fastres import _library
from fastres.cli import main
from fastres.errors import UserError
from fastres.evaluate import roofline
from fastres.evaluate.roofline import Limits

needs_native = pytest.mark.skipif(
    _library.native_error() is not None or not hasattr(_library._native, "machine_limits"),
    reason="needs a native library with machine_limits",
)
LIMITS = Limits(2, {"fp32": 100e9, "bf16": 150e9, "bf16_tiles": 1200e9}, {1024: 100e9, 65536: 10e9})


def step(**values):
    return {
        "name": "conv1", "op": "conv", "kernel": "amx", "flops": 4e6, "activation_bytes": 900, "weight_bytes": 100,
        "seconds": 1e-3, **values,
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    return roofline.measure_limits(1)


@needs_native
def test_limits_are_plausible_and_ordered(measured):
    assert measured.threads == 1 and 1e9 < measured.flops["fp32"] < 1e12
    isa = _library.isa()
    assert ("bf16" in measured.flops) == (isa in ("avx512_bf16", "amx"))
    assert ("bf16_tiles" in measured.flops) == (isa == "amx")
    # A peak that the compiler folded away, or that left the registers, would break these.
    if "bf16_tiles" in measured.flops:
        assert measured.flops["bf16_tiles"] > 2 * measured.flops["fp32"]
    rates = [rate for _, rate in sorted(measured.read.items())]
    assert len(rates) == 4 and min(rates) > 0.3e9 and max(rates) < 2e12
    assert rates[0] > rates[-1], "the first cache is nearer than 64 MiB"


@needs_native
def test_limits_need_a_thread():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _library._native.machine_limits(0)


def test_the_peak_of_a_dtype():
    assert LIMITS.peak("bf16") == (1200e9, "bf16 tiles")
    assert LIMITS.peak("fp32") == (200e9, "bf16 tiles / 6")
    assert Limits(1, {"fp32": 100e9, "bf16": 150e9}, {}).peak("bf16") == (150e9, "vector bf16")
    assert Limits(1, {"fp32": 100e9, "bf16": 150e9}, {}).peak("fp32") == (100e9, "vector fp32")
    slow_tiles = Limits(1, {"fp32": 100e9, "bf16_tiles": 300e9}, {})
    assert slow_tiles.peak("fp32") == (100e9, "vector fp32")


def test_the_best_of_two_measurements():
    other = Limits(2, {"fp32": 120e9, "bf16": 10e9, "bf16_tiles": 1e9}, {1024: 1e9, 65536: 20e9})
    best = Limits(2, {"fp32": 120e9, "bf16": 150e9, "bf16_tiles": 1200e9}, {1024: 100e9, 65536: 20e9})
    assert LIMITS.best(other) == other.best(LIMITS) == best


def test_bandwidth_is_that_of_a_buffer_which_holds_the_bytes():
    assert LIMITS.bandwidth(100) == LIMITS.bandwidth(2048) == 100e9  # two threads share them
    assert LIMITS.bandwidth(2049) == LIMITS.bandwidth(1e9) == 10e9


def test_a_step_is_held_against_the_nearer_limit():
    computing, moving, pool = roofline.lines_of(
        [step(), step(flops=2e3, activation_bytes=1_000_000), step(flops=0, kernel="", op="max_pool")], "fp32", LIMITS
    )
    assert computing.intensity == 4000 and computing.least_s == pytest.approx(4e6 / 200e9)
    assert computing.fraction == pytest.approx(0.02)
    assert moving.least_s == pytest.approx(1_000_100 / 10e9) and pool.least_s == pytest.approx(1000 / 100e9)
    assert pool.kernel == "max_pool"
    # The same as min(peak, intensity x bandwidth) against the rate that was reached.
    reachable = min(200e9, moving.intensity * 10e9)
    assert moving.fraction == pytest.approx(moving.flops / moving.seconds / reachable)
    total = roofline.total_of([computing, moving, pool])
    assert total.seconds == pytest.approx(3e-3) and total.flops == pytest.approx(4e6 + 2e3)
    assert total.fraction == pytest.approx((computing.least_s + moving.least_s + pool.least_s) / 3e-3)


def test_cells_and_notes():
    lines = roofline.lines_of([step(), step(flops=0, kernel="", op="input")], "fp32", LIMITS)
    first, second = (roofline.cells(line, 2e-3) for line in lines)
    assert first == ("conv1", "amx", "1.000", "50.0%", "4.0", "0.00", "4000.0", "2%")
    assert second[1] == "input" and second[4] == "–" and len(first) == len(roofline.HEADER)
    text = "\n".join(roofline.notes(LIMITS, "fp32", lines))
    assert "bf16 tiles / 6" in text and "6 products" in text and "More than" not in text
    assert "6 products" not in "\n".join(roofline.notes(LIMITS, "bf16", lines))
    fast = roofline.lines_of([step(seconds=1e-9)], "fp32", LIMITS)
    assert "More than 100 %" in roofline.notes(LIMITS, "fp32", fast)[-1]
    assert "Winograd" not in text
    assert (
        "direct convolution"
        in roofline.notes(LIMITS, "fp32", roofline.lines_of([step(kernel="winograd4")], "fp32", LIMITS))[-1]
    )


def test_the_plot_repeats(tmp_path):
    lines = roofline.lines_of([step(), step(name="fc", kernel="direct", flops=1e4)], "fp32", LIMITS)
    for name in ("a.svg", "b.svg"):
        roofline.draw(lines, "fp32", LIMITS, "tiny", tmp_path / name)
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    for text in (b"<!-- GFLOP/s -->", b"<!-- amx -->", b"<!-- direct -->", b"<!-- FLOP / byte -->"):
        assert text in content
    with pytest.raises(UserError, match="can't write"):
        roofline.draw(lines, "fp32", LIMITS, "tiny", tmp_path / "a.txt.nothing")


@needs_native
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_command(capsys, monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(roofline, "measure_limits", lambda threads: LIMITS)
    before = torch.get_num_threads()
    out = tmp_path / "roofline.svg"
    arguments = ["explain", "--roofline", "resnet20", "--batch", "2", "--dtype", dtype, "--repeats", "2"]
    assert main([*arguments, "--threads", str(before + 1), "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert torch.get_num_threads() == before and out.exists() and "wrote" in shown
    for text in ("resnet20, 2x3x32x32", dtype, "conv1", "total", "of the limit", "Measured on 2 threads"):
        assert text in shown
    assert ("6 products" in shown) == (dtype == "fp32")


def test_without_a_native_library_a_reason_is_given(capsys, monkeypatch):
    monkeypatch.setitem(_library._errors, "native", "it was not built")
    with pytest.raises(UserError, match="machine limits need the native library: it was not built"):
        roofline.measure_limits(1)
    monkeypatch.setitem(_library._errors, "native", None)
    monkeypatch.setattr(_library, "_native", object())
    assert main(["explain", "--roofline", "resnet20"]) == 2
    assert "build it again" in capsys.readouterr().err
