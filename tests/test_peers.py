"""Comparing with other runtimes: parity before figures, reasons instead of crashes, ratios of the same round, what is shown."""

import json
import os
import sys

import pytest
import torch
from conftest import require

from fastres.cli import main
from fastres.evaluate.peers import CONTENDERS, LIMITS, PEERS, PLAN, Reference, Run, contenders, measuring, table
from fastres.evaluate.peers.memory import memory_row
from fastres.evaluate.peers.plot import draw

NET, SIDE = "resnet20", 16
OURS = [PLAN, "fastres-modules", "eager"]


@pytest.fixture(scope="module")
def reference():
    return Reference(NET, SIDE)


@pytest.fixture(scope="module")
def rows(reference):
    return measuring.run_case(reference.problem(2, "fp32"), [*OURS, "zentorch"], rounds=3)


def by_name(rows):
    return {row["baseline"]: row for row in rows}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_agree_with_float64(reference, dtype):
    problem = reference.problem(6, dtype)
    for run in measuring.prepare(problem, OURS):
        assert run.reason is None and run.call is not None and run.error <= LIMITS[dtype], run
    assert len({tuple(image.flatten()[:4].tolist()) for image in problem.images}) == contenders.DISTINCT
    error = problem.error(problem.truth + 0.25 * problem.truth.abs().max())
    assert error == pytest.approx(0.25)
    assert problem.error(problem.truth[:1]) == float("inf")
    assert problem.error(problem.truth * float("nan")) == float("inf")


def test_the_reference_would_show_a_missing_batch_norm(reference):
    problem = reference.problem(2, "fp32")
    model, x = problem.prepared()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.zero_()
    assert problem.error(model(x)) > LIMITS["bf16"]


def test_no_figure_where_parity_fails(reference, monkeypatch):
    def wrong(problem):
        call = contenders.eager(problem)
        return lambda: call() * 1.001

    monkeypatch.setitem(CONTENDERS, "eager", wrong)
    found = by_name(measuring.run_case(reference.problem(2, "fp32"), [PLAN, "eager"], rounds=2))
    row = found["eager"]
    assert row["seconds"] is None and row["over_plan"] is None and not row["best_peer"] and row["rounds"] == 0
    assert "parity failed" in row["reason"] and row["error"] == pytest.approx(1e-3, rel=0.2)
    assert found[PLAN]["seconds"] is not None


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "zentorch"])
def test_a_missing_peer_gives_its_reason(reference, monkeypatch, name):
    find = contenders.importlib.util.find_spec
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    (run,) = measuring.prepare(reference.problem(1, "fp32"), [name])
    assert (run.call, run.error, run.reason) == (None, None, "not installed")


def test_a_peer_that_crashes_gives_its_reason(reference, monkeypatch):
    def broken(problem):
        raise RuntimeError("no such instruction\nmore lines")

    monkeypatch.setitem(CONTENDERS, "openvino", broken)
    runs = measuring.prepare(reference.problem(1, "fp32"), ["openvino", "eager"])
    assert runs[0].reason == "RuntimeError: no such instruction" and runs[1].call is not None
    (ort,) = measuring.prepare(reference.problem(1, "bf16"), ["onnxruntime"])
    assert ort.reason == "no bf16 convolution"


@pytest.mark.parametrize(("name", "dtype"), [("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32")])
def test_installed_runtimes_agree(reference, name, dtype):
    require(name)
    (run,) = measuring.prepare(reference.problem(3, dtype), [name])
    assert run.reason is None and run.error <= LIMITS[dtype]


def test_importing_loads_no_other_runtime():
    import subprocess

    code = "import sys, fastres.evaluate.peers as p; print({'openvino', 'onnxruntime', 'onnx', 'zentorch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_modules_run_without_plans(reference, monkeypatch):
    import fastres

    seen = []
    made = fastres.create_model

    def create(*arguments, **options):
        model = made(*arguments, **options)
        if options.get("fused"):
            model.register_forward_pre_hook(lambda *_: seen.append(os.environ.get("FASTRES_PLAN")))
        return model

    monkeypatch.setattr(fastres, "create_model", create)
    monkeypatch.setenv("FASTRES_PLAN", "AUTO")
    contenders.fastres_modules(reference.problem(1, "fp32"))()
    assert seen == ["OFF"] and os.environ["FASTRES_PLAN"] == "AUTO"


def test_a_backend_leaves_nothing_to_the_next_that_compiles(reference, monkeypatch):
    from torch._inductor import config

    seen = []

    def compile_(model, **options):
        def call(x):
            seen.append((config.freezing, config.joint_custom_post_pass))
            config.joint_custom_post_pass = str  # zentorch does this, and leaves it there
            return model(x)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    before = config.freezing, config.joint_custom_post_pass
    try:
        for _ in range(2):
            contenders.compiled(reference.problem(1, "fp32"))
            assert (config.freezing, config.joint_custom_post_pass) == before
    finally:
        config.joint_custom_post_pass = before[1]
    assert seen == [(True, None)] * 2


def test_ratios_are_of_the_same_round():
    ours, theirs = Run(PLAN, seconds=[1.0, 2.0, 4.0]), Run("eager", seconds=[2.0, 4.0, 8.0])
    assert measuring.paired(theirs, ours) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert measuring.paired(Run("eager"), ours) is None and measuring.paired(theirs, None) is None


def test_a_timed_call_follows_an_untimed_one_and_the_order_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(measuring, "SETTLE_S", 0.0)
    runs = [Run(name, call=lambda name=name: calls.append(name)) for name in "abc"] + [Run("absent", reason="none")]
    measuring.measure(runs, 3)
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(run.seconds) for run in runs] == [3, 3, 3, 0]


def test_rows_name_the_fastest_peer(reference):
    runs = [
        Run(PLAN, error=0.0, seconds=[2.0, 2.0]),
        Run("fastres-modules", error=0.0, seconds=[0.5, 0.5]),  # ours, so no peer
        Run("eager", error=0.0, seconds=[6.0, 6.0]),
        Run("openvino", error=0.0, seconds=[3.0, 3.0]),
        Run("compile", reason="no compiler"),
    ]
    found = by_name(measuring.rows_of(reference.problem(2, "fp32"), runs))
    assert [name for name, row in found.items() if row["best_peer"]] == ["openvino"]
    assert found["openvino"]["over_plan"]["median"] == 1.5 and "fastres-modules" not in PEERS
    json.dumps(list(found.values()), allow_nan=False)


def test_tables_say_what_was_measured(rows):
    header, *lines = list(table.text_tables(rows))[1:]
    assert all(title in header for title in ("ms/image", "logits error", "time / fastres plan"))
    assert len(lines) == 4 and "not installed" in lines[-1] and " *" in next(x for x in lines if "eager" in x)
    text = "\n".join(table.markdown(rows))
    assert "| network | dtype | batch | fastres plan | fastres modules | PyTorch eager | best other / plan |" in text
    assert "| resnet20 | fp32 | 2 |" in text and "zentorch (fp32): not installed" in text
    best = next(row for row in rows if row["best_peer"])["over_plan"]
    assert f"{best['median']:.2f} ({best['low']:.2f}–{best['high']:.2f})" in text


def test_the_plot_has_a_panel_for_each_dtype_and_batch_and_repeats(rows, tmp_path):
    every = [{**row, "dtype": d, "batch": b} for row in rows for d in ("fp32", "bf16") for b in (2, 4)]
    draw(every, tmp_path / "a.svg")
    draw(every, tmp_path / "b.svg")
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.svg").read_bytes()
    for title in (b"fp32, batch 2", b"bf16, batch 4", b"PyTorch eager"):
        assert b"<!-- " + title + b" -->" in content
    assert b"zentorch" not in content
    draw([], tmp_path / "empty.svg")


def test_scaling_restores_the_threads(reference):
    before = torch.get_num_threads()
    found = measuring.scaling(reference, 2, "fp32", rounds=2)
    assert torch.get_num_threads() == before and [row["threads"] for row in found] == [1, 2]
    assert found[0]["speed_up"]["median"] == 1.0 and all(row["seconds"] for row in found)


@pytest.mark.slow
def test_memory_is_that_of_another_process():
    row = memory_row("resnet18", 2, "fp32", "eager", threads=1)
    weights = 4 * 11_689_512
    assert row["reason"] is None and row["error"] <= 1e-4
    assert weights <= row["running_bytes"] <= row["peak_bytes"] + 2**20 and row["peak_bytes"] < 6 * weights
    assert memory_row(NET, 2, "bf16", "onnxruntime", threads=1)["reason"] == "no bf16 convolution"
    assert "unknown model" in memory_row("resnet99", 2, "fp32", "eager", threads=1)["reason"]


def test_the_command(capsys, tmp_path):
    out = tmp_path / "peers.json"
    arguments = [
        "bench",
        "--peers",
        "--nets",
        NET,
        "--batches",
        "1",
        "2",
        "--dtypes",
        "fp32",
        "--rounds",
        "2",
        "--scaling",
    ]
    arguments += ["--image-size", str(SIDE), "--contenders", *OURS, "zentorch", "--output", str(out)]
    threads = torch.get_num_threads()
    try:
        assert main([*arguments, "--threads", "1", "--plot", str(tmp_path / "p.svg")]) == 0
    finally:
        torch.set_num_threads(threads)
    shown, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "fastres plan" in shown and "not installed" in shown and "speed-up" in shown
    latency = table.of_kind(content["rows"], "latency")
    assert len(latency) == 2 * 4 and {row["threads"] for row in latency} == {1} and content["machine"]["threads"] == 1
    assert all(row["rounds"] == 2 for row in latency if row["seconds"]) and (tmp_path / "p.svg").exists()


def test_the_command_fails_where_our_logits_are_wrong(capsys, monkeypatch):
    honest = CONTENDERS[PLAN]

    def wrong(problem):
        call = honest(problem)
        return lambda: call() + 1

    monkeypatch.setitem(CONTENDERS, PLAN, wrong)
    arguments = ["bench", "--peers", "--nets", NET, "--batches", "1", "--dtypes", "fp32", "--rounds", "1"]
    assert main([*arguments, "--image-size", str(SIDE), "--contenders", PLAN, "eager"]) == 1
    assert "parity failed" in capsys.readouterr().out


def test_a_network_or_peers_must_be_given(capsys):
    assert main(["bench"]) == 2 and "--peers" in capsys.readouterr().err
    assert main(["bench", "--peers", "--nets", "resnet99"]) == 2
    assert "unknown model 'resnet99'" in capsys.readouterr().err
