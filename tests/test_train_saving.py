"""Checkpoints on disk: how many are kept, what a full disk or a kill leaves, and runs killed at random points."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import Acting

from fastres.errors import CheckpointError
from fastres.train import Settings, checkpoint, train
from fastres.train.saving import Saver, clear_partial, snapshot


def small(out, **changes):
    return Settings(
        "resnet20", out=str(out), batch_size=32, limit=96, image_size=16, device="cpu", **{"epochs": 2, **changes}
    )


@pytest.mark.parametrize("processes, points", [(1, 2), (2, 1)])
def test_runs_killed_at_random_points_end_with_the_same_bits(processes, points):
    script = Path(__file__).parent / "kill_and_resume.py"
    arguments = [sys.executable, str(script), "--points", str(points), "--processes", str(processes), "--seed", "7"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and f"{points} of {points} points identical" in done.stdout, done.stdout + done.stderr


def test_the_newest_and_the_best_are_kept(tmp_path):
    run, _ = train(small(tmp_path, save_every=1, keep=3), Acting())
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["checkpoint-00000004.pt", "checkpoint-00000005.pt", "checkpoint-00000006.pt"] + [
        "checkpoint-best.pt", "checkpoint-last.pt"
    ]  # fmt: skip
    states = {name: checkpoint.load_checkpoint(tmp_path / name) for name in names}
    assert [states[name]["iteration"] for name in names[:3]] == [4, 5, 6] and states["checkpoint-last.pt"][
        "iteration"
    ] == 6
    assert states["checkpoint-best.pt"]["rows"][-1]["test_acc"] == run.best
    whole = states["checkpoint-last.pt"]["model"]
    again, _ = train(small(tmp_path, resume=str(tmp_path / names[0]), keep=3), Acting())
    assert (tmp_path / "checkpoint-last.pt.old").exists() and (tmp_path / names[0]).exists()
    assert all(torch.equal(value, whole[name]) for name, value in again.model.state_dict().items())


def test_saving_in_a_thread_keeps_the_state_of_its_step(tmp_path):
    value = torch.zeros(1000)
    state = {"config": {}, "values": [value, {"x": (value, 3)}]}
    copy = snapshot(state)
    saver = Saver(tmp_path, asynchronous=True)
    saver.save(state, ("a.pt",), 1)
    value.fill_(7)
    saver.wait()
    saved = checkpoint.load_checkpoint(tmp_path / "a.pt")
    assert not saved["values"][0].any() and not copy["values"][1]["x"][0].any()
    train(small(tmp_path / "x", async_save=True), Acting())
    train(small(tmp_path / "y", async_save=False), Acting())
    first, second = (checkpoint.load_checkpoint(tmp_path / n / "checkpoint-last.pt") for n in "xy")
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, asynchronous):
    train(small(tmp_path, epochs=1), Acting())
    before = (tmp_path / "checkpoint-last.pt").read_bytes()
    real = os.fsync

    def full(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.startswith(".checkpoint") and name.endswith(".part"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-last\.pt can't be written.*No space left"):
        train(small(tmp_path, epochs=3, schedule="constant", async_save=asynchronous), Acting())
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-last.pt").read_bytes() == before and not list(tmp_path.glob(".*.part"))
    run, _ = train(small(tmp_path, epochs=2, schedule="constant"), Acting())
    assert run.epoch == 2


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f".checkpoint-last.pt.{gone.pid}.part").write_bytes(b"half")
    (tmp_path / ".checkpoint-last.pt.1.part").write_bytes(b"of a process that lives")
    clear_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoint-last.pt.1.part"]


def test_other_classes_are_refused_with_the_first_that_differs(tmp_path):
    train(small(tmp_path, epochs=1), Acting())
    state = checkpoint.load_checkpoint(tmp_path / "checkpoint-last.pt")
    state["classes"][3] = "drei"
    torch.save(state, tmp_path / "checkpoint-last.pt")
    with pytest.raises(CheckpointError, match=r"of other classes: 10 saved, 10 now; class 3 was 'drei', is '3'"):
        train(small(tmp_path), Acting())


def test_an_average_that_is_only_saved_or_only_asked_for(tmp_path):
    train(small(tmp_path, epochs=1), Acting())
    with pytest.raises(CheckpointError, match="has no average of weights"):
        train(small(tmp_path, ema=0.9), Acting())


def test_a_newer_format_is_named(tmp_path):
    torch.save({"format": 9, "config": {}, "versions": {"fastres": "7.0"}}, tmp_path / "checkpoint-last.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint of format 1: it has format 9, written by fastres 7\.0"):
        train(small(tmp_path), Acting())


def test_numbers_of_every_generator_are_restored():
    import random

    import numpy

    state = checkpoint.random_state()
    first = (random.random(), numpy.random.rand(3).tolist(), torch.rand(3).tolist())
    checkpoint.set_random_state(snapshot(state))
    assert first == (random.random(), numpy.random.rand(3).tolist(), torch.rand(3).tolist())
