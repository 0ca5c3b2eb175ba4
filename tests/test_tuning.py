"""fastres tune: what is measured, kept and used."""

import json

import pytest
import torch

import fastres
from fastres import _library, backends, tuner, tuning
from fastres.errors import InputError

pytestmark = pytest.mark.skipif(_library.native_error() is not None, reason="the native library is absent")
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty file of choices, forgotten afterwards."""
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "deep" / "tune.json"))
    tuning.forget()
    yield tmp_path / "deep" / "tune.json"
    monkeypatch.undo()
    tuning.forget()


def other_choices(report):
    """The report's choices turned round: for each problem a candidate that was not the fastest."""
    turned = {}
    for row in report.rows:
        others = sorted(set(row.ms) - {row.choice})
        if others:
            turned[row.problem] = {"choice": others[0], "ms": row.ms}
    return turned


def test_training_choices_are_kept_and_used(cache):
    model = fastres.create_model("resnet20").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = fastres.tune(model, X, rounds=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "measuring changes nothing"
    assert report.file == cache and len(report.rows) > 3 and all("conv_stats" in r.problem for r in report.rows)
    assert all(set(r.ms) == {"library", "native"} and r.choice == min(r.ms, key=r.ms.get) for r in report.rows)
    for choices in ({r.problem: {"choice": r.choice} for r in report.rows}, other_choices(report)):
        tuning.save(choices)
        rows = [row for row in fastres.explain(model, X).rows if row.op == "conv_stats"]
        assert {row.backend for row in rows} <= {"library", "native"}
        with backends.recording({}) as recorder:
            model(X)
        for _, problem, choice in recorder.rows:
            if problem.conv is not None:
                assert choice.backend == choices[problem.key()]["choice"]


def test_a_plan_takes_the_measured_kernels(cache):
    model = fastres.create_model("resnet20").eval()
    report = fastres.tune(model, X, rounds=1)
    turned = other_choices(report)
    plans = {p: c["choice"] for p, c in turned.items() if p.startswith("plan|")}
    if len(_library._native.conv_kernels()) > 1:
        assert plans, "several kernels serve some layer"
    tuning.save(turned)
    compiled = fastres.compile(model, X)
    for step in compiled.steps():
        if step.get("problem") in plans:
            assert step["kernel"] == plans[step["problem"]]
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_wrong_candidate_is_dropped(cache, monkeypatch):
    model = fastres.create_model("resnet20").eval()
    monkeypatch.setattr(tuner, "_difference", lambda a, b: 0.5)
    rows = [r for r in fastres.tune(model, X, rounds=1).rows if r.problem.startswith("conv_act|")]
    assert rows and all("differs from the library" in why for r in rows for why in r.dropped.values())
    assert "dropped" in str(tuner.TuningReport(rows))


def test_unknown_and_broken_files_count_as_empty(cache):
    cache.parent.mkdir()
    for content in ("{", "[1]", '{"x": 3}', json.dumps({tuning.fingerprint(): {"a": 1}})):
        cache.write_text(content)
        tuning.forget()
        assert tuning.choice("a") is None
    cache.write_text("{")
    assert "could not be read" in tuning.read(cache)[1]
    tuning.save({"a": {"choice": "native"}})
    assert tuning.choice("a") == "native" and tuning.choice("b") is None
    tuning.save({"b": {"choice": "library"}})
    assert tuning.choice("a") == "native", "what was there stays"


def test_errors(cache, monkeypatch):
    with pytest.raises(InputError, match="fuse it first"):
        fastres.tune(torch.nn.Sequential(torch.nn.ReLU()).train(), X)
    monkeypatch.setenv(tuning.VARIABLE, "OFF")
    with pytest.raises(InputError, match="FASTRES_TUNE_CACHE=OFF"):
        tuning.save({})
    assert tuning.path() is None


def test_the_command(cache, capsys):
    from fastres.cli import main

    assert main(["tune", "resnet20", "--batch-size", "1", "--rounds", "1", "--mode", "train"]) == 0
    assert "problems measured" in capsys.readouterr().out and cache.exists()
