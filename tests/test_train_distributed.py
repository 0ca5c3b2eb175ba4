"""Training in several processes: the same as one on the joint batch, resuming, and what ends when a process ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import Acting, run_ranks

import fastres
from fastres.errors import CheckpointError, UserError
from fastres.train import Settings, checkpoint, train

CLOSE = 5e-3  # of float32 sums in another order, after two steps: a ReLU may flip


def values(out, **changes):
    size = {"epochs": 1, "batch_size": 24, "image_size": 16, "limit": 48, "lr": 0.02, "device": "cpu", "threads": 1}
    return {"model": "resnet20", "out": str(out), "warmup": 0.0, **size, **changes}


def ended_with(out):
    return checkpoint.load_checkpoint(out / "checkpoint-last.pt")


def distance(first, second):
    """How far the parameters of two state dicts are from each other, as a share of how far the first came from the start."""
    torch.manual_seed(0)
    start = fastres.create_model("resnet20", num_classes=10, in_channels=1).state_dict()
    names = [name for name, value in start.items() if value.is_floating_point() and "running" not in name]
    apart = sum(float((first[name] - second[name]).square().sum()) for name in names)
    return (apart / sum(float((first[name] - start[name]).square().sum()) for name in names)) ** 0.5


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process on the joint batch, and in two parts."""
    folder = tmp_path_factory.mktemp("one")
    train(Settings(**values(folder / "whole")), Acting())
    train(Settings(**values(folder / "parts", accumulate=2)), Acting())
    return ended_with(folder / "whole"), ended_with(folder / "parts")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        "plain": {}, "sync": {"sync_bn": True}, "reference": {"sync_bn": True, "fused": False}, "zero": {"zero": True},
        "compress": {"compress": True}, "parts": {"sync_bn": True, "accumulate": 2}, "bf16": {"dtype": "bf16"},
        "fp16": {"dtype": "fp16", "fused": False},
    }  # fmt: skip
    sent = run_ranks(2, [(values(folder / name, **changes), None) for name, changes in jobs.items()])
    for mine in sent:
        for name, answer in zip(jobs, mine, strict=True):
            assert answer[0] == "ended", (name, answer)
    return {name: ended_with(folder / name) for name in jobs}, folder


@pytest.mark.parametrize("name", ["sync", "reference"])
def test_two_processes_with_synchronised_statistics_are_one_on_the_joint_batch(one, two, name):
    whole, found = one[0], two[0][name]
    assert distance(whole["model"], found["model"]) < CLOSE
    assert found["rows"][0]["train_loss"] == pytest.approx(whole["rows"][0]["train_loss"], rel=1e-5)
    assert found["rows"][0]["test_loss"] == pytest.approx(whole["rows"][0]["test_loss"], rel=1e-4)
    assert found["rows"][0]["test_acc"] == pytest.approx(whole["rows"][0]["test_acc"], abs=0.021)
    assert found["world_size"] == 2 and len(found["ranks"]) == 1


def test_two_processes_are_one_with_a_batch_in_two_parts(one, two):
    whole, parts = one
    assert distance(parts["model"], two[0]["plain"]["model"]) < CLOSE
    assert distance(parts["model"], whole["model"]) > 10 * CLOSE, "statistics of a part are others"


def test_options_of_the_exchange(two):
    found, plain = two[0], two[0]["plain"]["model"]
    assert all(torch.equal(plain[name], found["zero"]["model"][name]) for name in plain)
    assert len(found["zero"]["optimizer"]["state"]) == len(found["plain"]["optimizer"]["state"])
    assert 0 < distance(plain, found["compress"]["model"]) < 0.1
    assert distance(found["sync"]["model"], found["parts"]["model"]) > CLOSE
    for name in ("bf16", "fp16"):
        assert 0 < found[name]["rows"][-1]["train_loss"] < 4
    assert found["fp16"]["scaler"]["scale"] > 0


def test_three_processes_stop_together_and_continue_bit_for_bit(one, tmp_path):
    jobs = [
        (values(tmp_path / "whole", sync_bn=True, deterministic=True), None),
        (values(tmp_path / "stopped", sync_bn=True, deterministic=True), "stop"),
        (values(tmp_path / "stopped", sync_bn=True, deterministic=True), None),
    ]
    sent = run_ranks(3, jobs)
    for whole, stopped, resumed in sent:
        assert (whole[1], stopped[1], resumed[1]) == (None, signal.SIGTERM, None), sent
    assert any("after epoch 0 and 2 batches" in text for text in sent[0][2][2]) and not sent[1][2][2]
    whole, found = ended_with(tmp_path / "whole"), ended_with(tmp_path / "stopped")
    assert distance(one[0]["model"], whole["model"]) < CLOSE
    assert all(torch.equal(whole["model"][name], found["model"][name]) for name in whole["model"])


@pytest.mark.parametrize("act", ["fail", "die"])
def test_a_process_that_ends_ends_the_others_with_its_error(tmp_path, act):
    first, second = run_ranks(2, [(values(tmp_path), act)])
    assert first[0][:1] == ("error",) and first[0][1].startswith("RankError: rank 0 of 2 ends because another"), first
    if act == "fail":
        assert "rank 1: DataError: b/7.jpg can't be decoded" in first[0][1]
        assert second[0][1] == "DataError: b/7.jpg can't be decoded"
    else:
        assert "killed, or out of memory" in first[0][1] and second[0][0] == "gone"


def test_another_number_of_processes_is_refused_or_divided_anew(two, tmp_path):
    (tmp_path / "checkpoint-last.pt").write_bytes((two[1] / "sync" / "checkpoint-last.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"is of 2 processes, this run has 1: .*--reshard"):
        train(Settings(**values(tmp_path, epochs=2)), Acting())
    run, _ = train(Settings(**values(tmp_path, epochs=2, reshard=True, sync_bn=True)), Acting())
    assert [row.epoch for row in run.rows] == [1, 2] and ended_with(tmp_path)["world_size"] == 1


def test_batches_that_can_not_be_divided(tmp_path):
    for changes, message in (
        ({"batch_size": 25, "accumulate": 2}, "25 can't be divided by 1 processes and 2 parts"),
        ({"batch_size": 4, "accumulate": 4}, "a part of one image"),
        ({"cuda_graphs": True}, "cuda_graphs needs a GPU"),
        ({"cuda_graphs": True, "compile": True}, "exclude each other"),
        ({"epochs": 1, "iterations": 3}, "are both given"),
        ({"keep": 0}, "keep must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            train(Settings(**values(tmp_path / "out", **changes)), Acting())


def test_incomplete_variables_of_torchrun_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=re.escape("RANK and WORLD_SIZE must both be set")):
        train(Settings(**values(tmp_path)), Acting())


def test_torchrun_starts_again_behind_the_last_checkpoint(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    command += ["-m", "fastres", "train", "resnet20", "--image-size", "16", "--limit", "96", "--batch-size", "32"]
    command += ["--epochs", "12", "--threads", "1", "--save-every", "1", "--out", str(tmp_path), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        lines = []
        for line in launcher.stdout:
            lines.append(line)
            if line.startswith("epoch  1/12"):
                children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
        launcher.wait(60)
    assert launcher.returncode == 0, "".join(lines)
    assert sum("continuing from" in line for line in lines) == 1 and ended_with(tmp_path)["epoch"] == 12
