"""The per-layer comparison of backends: figures that add up, and a run of it on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import layers, record

ROWS = [
    {"layer": "conv1", "count": 1, "ms": {"library": 2.0, "triton": 1.5, "cuda": 1.0}, "dropped": {}},
    {"layer": "layer1.0", "count": 3, "ms": {"library": 1.0, "triton": 0.5}, "dropped": {"cuda": "differs in result 0"}},
]  # fmt: skip


def test_sums_and_table():
    # what a backend has no figure for, the library computes
    assert layers.totals(ROWS) == pytest.approx({"library": 5.0, "triton": 3.0, "cuda": 4.0, "best": 2.5})
    lines = layers.table(ROWS).splitlines()
    assert lines[0].split() == ["layer", "times", "library", "triton", "cuda", "fastest"]
    assert lines[1].split() == ["conv1", "1", "2.000", "1.500", "1.000", "cuda"]
    assert lines[2].split()[-2:] == ["-", "triton"] and "cuda dropped: differs in result 0" in lines[3]
    assert lines[4].split()[2:] == ["4", "5.000", "3.000", "4.000"] and "2.500 ms" in lines[5]


def test_a_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("FASTRES_TUNE_CACHE", str(tmp_path / "tune.json"))
    small = [
        "resnet20",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--batch-size",
        "1",
        "--image-size",
        "8",
        "--rounds",
        "1",
    ]
    assert layers.main([*small, "--save"]) == 0
    out = capsys.readouterr().out
    assert "library" in out and "native" in out and "each by its fastest" in out
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert sum(row["count"] for row in rows) >= 19 and all(row["ms"]["library"] > 0 for row in rows)
    assert not (tmp_path / "tune.json").exists(), "nothing is kept"


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        layers.main([])
    assert "torch sees no CUDA device" in capsys.readouterr().err
