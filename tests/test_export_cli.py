"""``fastres export``: networks by name, checkpoints, and the one line that a mistake gives."""

import re

import pytest
import torch

import fastres
from fastres import export
from fastres.cli import main
from fastres.train.checkpoint import save_checkpoint


def command(capsys, *arguments):
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    try:
        code = main(["export", *(str(a) for a in arguments)])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err.strip()


def fails(capsys, *arguments):
    code, out, err = command(capsys, *arguments)
    assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in out + err, err
    return err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What ``fastres train`` writes, as far as an export reads it."""
    path = tmp_path_factory.mktemp("run") / "checkpoint-best.pt"
    model = export.untrained("resnet20", num_classes=4, in_channels=1, seed=3)
    state = {
        "config": model.config, "model": model.state_dict(), "classes": ["a", "b", "c", "d"], "input_shape": [1, 8, 8],
        "settings": {"data": "digits", "normalize": "channel"}, "epoch": 3,
    }  # fmt: skip
    save_checkpoint(state, path)
    return path, model


def test_a_checkpoint(checkpoint, capsys, tmp_path):
    path, model = checkpoint
    code, out, _ = command(
        capsys, "resnet20", "--checkpoint", path, "--format", "torch-export", "--out", tmp_path / "n.pt2"
    )
    assert code == 0 and "tracing" in out and "comparing" in out and "random weights" not in out
    assert re.search(
        r"n\.pt2: torch-export, \d\.\d MB, images Nx1x8x8, 19 BatchNorms folded; largest difference .*allowed", out
    )
    program = export.load(tmp_path / "n.pt2")
    assert program.about["classes"] == ["a", "b", "c", "d"] and program.about["normalize"] == "channel"
    assert program.about["trained_on"] == "digits" and program.about["epoch"] == 3
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(program(x), model(x), atol=1e-4, rtol=1e-4)


def test_the_average_of_weights_is_preferred(checkpoint, capsys, tmp_path):
    from torch.optim.swa_utils import AveragedModel

    model = checkpoint[1]
    average = AveragedModel(model, use_buffers=True)
    state = {
        "config": model.config, "model": model.state_dict(), "ema": average.state_dict(), "input_shape": [1, 8, 8],
        "settings": {"test_image_size": 12},
    }  # fmt: skip
    save_checkpoint(state, tmp_path / "c.pt")  # nothing was averaged yet
    options = ["--checkpoint", tmp_path / "c.pt", "--out", tmp_path / "w.safetensors"]
    assert command(capsys, *options)[0] == 0 and torch.equal(export.load(options[-1]).fc.bias, model.fc.bias)
    average.module.fc.bias.data.add_(1)
    average.n_averaged.add_(1)
    save_checkpoint({**state, "ema": average.state_dict()}, tmp_path / "c.pt")
    code, out, _ = command(capsys, *options)
    assert code == 0 and torch.equal(export.load(options[-1]).fc.bias, model.fc.bias + 1)
    assert "Nx1x12x12" in out, "the size of test images"
    assert command(capsys, *options, "--no-ema")[0] == 0 and torch.equal(
        export.load(options[-1]).fc.bias, model.fc.bias
    )


def test_without_a_name_and_without_a_path(checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = command(capsys, "--checkpoint", checkpoint[0], "--format", "safetensors", "--no-fused")
    assert code == 0 and torch.equal(export.load("checkpoint-best.safetensors").fc.bias, checkpoint[1].fc.bias)
    weights = tmp_path / "checkpoint-best.safetensors"
    code, _, _ = command(capsys, "resnet20", "--weights", weights, "--num-classes", 4, "--out", "again.safetensors")
    assert code == 2, "the file is of a network with one channel"


def test_a_name_alone_has_random_weights(capsys, tmp_path):
    code, out, _ = command(
        capsys, "resnet20", "--out", tmp_path / "r.safetensors", "--num-classes", 3, "--image-size", 16
    )
    assert code == 0 and "resnet20 has random weights: good for timing only" in out
    assert "images Nx3x16x16" in out and export.load(tmp_path / "r.safetensors").fc.out_features == 3


def test_mistakes_are_one_line(checkpoint, capsys, tmp_path):
    path, _ = checkpoint
    out = ["--out", tmp_path / "n.safetensors"]
    assert "is of resnet20, not of resnet32" in fails(capsys, "resnet32", "--checkpoint", path, *out)
    assert "has 4 classes, not 5" in fails(capsys, "--checkpoint", path, "--num-classes", 5, *out)
    assert "unknown model 'resnet21'; close to" in fails(capsys, "resnet21", *out)
    assert "unknown format 'safetensor'; close to safetensors" in fails(capsys, "resnet20", "--format", "safetensor")
    assert "--format or --out is missing" in fails(capsys, "resnet20")
    assert "MODEL is missing" in fails(capsys, *out)
    assert "a checkpoint has its own weights" in fails(capsys, "--checkpoint", path, "--weights", path, *out)
    assert "does not exist" in fails(capsys, "--checkpoint", tmp_path / "none.pt", *out)
    assert "no folder" in fails(capsys, "resnet20", "--out", tmp_path / "none" / "n.safetensors")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in fails(capsys, "--checkpoint", damaged, *out)
    state = {
        "config": {**fastres.create_model("resnet20").config, "num_classes": 9},
        "model": checkpoint[1].state_dict(),
    }
    save_checkpoint(state, damaged)
    message = fails(capsys, "--checkpoint", damaged, *out)
    assert "fc.weight [4, 64] (the model has [9, 64])" in message and "checkpoint" in message
    assert [p.name for p in tmp_path.iterdir()] == ["damaged.pt"]
