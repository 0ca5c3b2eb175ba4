"""Training: schedules, parameter groups, checkpoints, exact resuming, stopping, divergence."""

import dataclasses
import os
import signal
import zipfile

import pytest
import torch
from torch import nn

import fastres
from fastres.data import create_loader
from fastres.errors import CheckpointError, DataError, DivergedError, UserError
from fastres.evaluate import evaluate
from fastres.train import RECIPES, Settings, checkpoint, train
from fastres.train.optim import Schedule, make_optimizer, parameter_groups
from fastres.train.records import COLUMNS, TensorBoard, read_log

TIMES = {"images_per_s", "data_wait_share", "epoch_s", "total_s"}


class Silent:
    """A reporter that keeps messages, and can act at one step."""

    def __init__(self, at=None, action=None):
        self.messages, self.at, self.action, self.steps = [], at, action, 0

    def message(self, text):
        self.messages.append(text)

    def begin_epoch(self, epoch, epochs, batches, done):
        self.epoch = epoch

    def step(self, done, loss, accuracy, images_per_s, data_wait):
        self.steps += 1
        assert 0 <= accuracy <= 1 and images_per_s > 0 and 0 <= data_wait <= 1
        if (self.epoch, done) == self.at:
            self.action()

    def end_epoch(self, row, epochs, best):
        pass

    def close(self):
        pass


def settings(out, **changes):
    size = {"epochs": 3, "batch_size": 32, "image_size": 16, "limit": 128}
    return Settings(**{"model": "resnet20", "out": str(out), "lr": 0.05, **size, **changes})


def equal(first, second):
    """Whether two nested states agree bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(v, second[k]) for k, v in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def outcome(folder):
    """What must not depend on how often a run was stopped."""
    state = checkpoint.load_checkpoint(folder / "checkpoint-last.pt")
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in state["rows"]]
    names = ("model", "optimizer", "epoch", "iteration", "best", "random", "loader")
    return {**{name: state[name] for name in names}, "rows": rows}


# --- schedules and parameters


def test_schedules_follow_their_definitions():
    step = Schedule("step", 0.1, 64000, milestones=(0.5, 0.75))
    assert [step(i) for i in (0, 31999, 32000, 47999, 48000, 63999)] == pytest.approx(
        [0.1] * 2 + [0.01] * 2 + [0.001] * 2
    )
    warm = Schedule("constant", 0.1, 100, warmup=4)
    assert [warm(i) for i in range(5)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    cosine = Schedule("cosine", 0.2, 110, warmup=10)
    assert [cosine(i) for i in (9, 10, 60, 110)] == pytest.approx([0.2, 0.2, 0.1, 0.0])
    rates = [cosine(i) for i in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


def test_weight_decay_is_for_conv_and_fc_weights_unless_asked():
    model = fastres.create_model("resnet20")
    decayed, others = parameter_groups(model, 1e-4)
    expected = {p for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in [m.weight]}
    assert set(decayed["params"]) == expected and decayed["weight_decay"] == 1e-4 and others["weight_decay"] == 0
    assert len(expected) + len(others["params"]) == len(list(model.parameters()))
    (everything,) = parameter_groups(model, 1e-4, decay_all=True)
    assert len(everything["params"]) == len(list(model.parameters()))
    optimizer = make_optimizer(model, lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0] and optimizer.defaults["momentum"] == 0.9


def test_recipes_fill_what_is_not_given():
    resolved = Settings("resnet20", data="fashion-mnist", lr=0.3).resolved()
    recipe = RECIPES["fashion-mnist"]
    assert resolved.lr == 0.3 and resolved.epochs == recipe.epochs and resolved.schedule == recipe.schedule
    assert resolved.out == "runs/resnet20-fashion-mnist"
    folder = Settings("resnet50", data="/data/imagenet/").resolved()
    assert folder.out == "runs/resnet50-imagenet" and folder.epochs == 90 and folder.milestones == [1 / 3, 2 / 3]
    assert folder.weight_decay == 1e-4 and folder.batch_size == 256 and folder.momentum == 0.9, "the ResNet paper"


# --- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three epochs without a stop."""
    out = tmp_path_factory.mktemp("finished")
    reporter = Silent()
    run, stopped = train(settings(out), reporter)
    return out, run, stopped, reporter


def test_a_run_learns_and_leaves_its_files(finished):
    out, run, stopped, reporter = finished
    assert stopped is None and run.epoch == 3 and run.iteration == 12 and reporter.steps == 15
    rows = read_log(out)
    assert [row.epoch for row in rows] == [1, 2, 3] and [row.iteration for row in rows] == [4, 8, 12]
    assert rows[-1].train_loss < rows[0].train_loss < 3.5
    assert rows[-1].total_s == pytest.approx(sum(row.epoch_s for row in rows), rel=1e-4)
    assert (out / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    names = {path.name.split(".")[0] for path in out.iterdir()}
    assert {"log", "checkpoint-last", "checkpoint-best", "events"} <= names
    best = checkpoint.load_checkpoint(out / "checkpoint-best.pt")
    assert best["rows"][-1]["test_acc"] == max(row["test_acc"] for row in outcome(out)["rows"]) == best["best"]
    assert best["config"]["name"] == "resnet20" and best["versions"]["torch"] == torch.__version__


def test_the_last_row_is_the_checkpoints_evaluation(finished):
    out, _, _, _ = finished
    state = checkpoint.load_checkpoint(out / "checkpoint-last.pt")
    model = fastres.create_model(**state["config"])
    model.load_state_dict(state["model"])
    for batch_size in (7, 128):
        loader = create_loader("digits", "test", batch_size=batch_size, image_size=16, limit=128)
        result = evaluate(model, loader)
        assert result.samples == 128 and result.top1 == state["rows"][-1]["test_acc"]
        assert result.loss == pytest.approx(state["rows"][-1]["test_loss"], rel=1e-5)
    assert model.training, "the mode is put back"


def test_tensorboard_has_the_rows(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, run, _, _ = finished
    events = EventAccumulator(str(out))
    events.Reload()
    assert [e.value for e in events.Scalars("test/acc")] == pytest.approx([row.test_acc for row in run.rows])


@pytest.mark.parametrize("at", [(1, 2), (2, 4), (3, 1)])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path, at, signum):
    previous = signal.getsignal(signum)
    run, stopped = train(settings(tmp_path), Silent(at, lambda: os.kill(os.getpid(), signum)))
    assert stopped == signum and run.epoch < 3 and signal.getsignal(signum) == previous
    torch.manual_seed(1234)
    reporter = Silent()
    run, stopped = train(settings(tmp_path), reporter)
    assert stopped is None and any("continuing from" in text for text in reporter.messages)
    assert equal(outcome(tmp_path), outcome(finished[0]))
    assert [row.test_loss for row in read_log(tmp_path)] == [row.test_loss for row in read_log(finished[0])]


def test_a_run_that_was_killed_between_epochs_continues_bit_for_bit(finished, tmp_path):
    class Killed(Exception):
        pass

    def die():
        raise Killed

    with pytest.raises(Killed):
        train(settings(tmp_path), Silent((2, 3), die))
    assert outcome(tmp_path)["epoch"] == 1
    train(settings(tmp_path), Silent())
    assert equal(outcome(tmp_path), outcome(finished[0]))


def test_random_numbers_go_on_where_they_were(tmp_path):
    def add_dropout(run):
        run.model.register_forward_pre_hook(lambda model, x: (nn.functional.dropout(x[0], 0.2, model.training),))

    for name, reporter in (
        ("whole", Silent()),
        ("parts", Silent((1, 3), lambda: os.kill(os.getpid(), signal.SIGTERM))),
    ):
        train(settings(tmp_path / name, epochs=1), reporter, add_dropout)
    train(settings(tmp_path / "parts", epochs=1), Silent(), add_dropout)
    assert equal(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_the_best_checkpoint_is_the_best_epochs(tmp_path, monkeypatch):
    from fastres.evaluate import Evaluation
    from fastres.train import loop

    accuracies = iter([0.5, 0.7, 0.7, 0.6])
    monkeypatch.setattr(loop, "evaluate", lambda *_: Evaluation(next(accuracies), 1.0, 1.0, 100))
    train(settings(tmp_path, epochs=4, limit=32), Silent())
    best = checkpoint.load_checkpoint(tmp_path / "checkpoint-best.pt")
    assert best["epoch"] == 2 and best["best"] == 0.7 and outcome(tmp_path)["best"] == 0.7


def test_fused_and_reference_train_alike(finished, tmp_path):
    run, _ = train(settings(tmp_path, fused=False, epochs=1, threads=2), Silent())
    assert run.rows[0].train_loss == pytest.approx(finished[1].rows[0].train_loss, rel=2e-3)
    assert not equal(outcome(tmp_path)["model"], outcome(finished[0])["model"])


def test_bf16_deterministic_and_recompute(tmp_path):
    options = {"dtype": "bf16", "deterministic": True, "memory": "recompute", "epochs": 1}
    run, _ = train(settings(tmp_path, **options), Silent())
    assert torch.are_deterministic_algorithms_enabled()
    assert 0 < run.rows[0].train_loss < 4 and all(p.dtype == torch.float32 for p in run.model.parameters())


def test_a_longer_run_goes_on_from_a_shorter_one(finished, tmp_path):
    train(settings(tmp_path, epochs=1, schedule="constant"), Silent())
    reporter = Silent()
    run, _ = train(settings(tmp_path, epochs=2, lr=0.01, schedule="constant"), reporter)
    assert [row.epoch for row in run.rows] == [1, 2] and run.rows[1].lr == 0.01
    assert any("changed: epochs 1 -> 2, lr 0.05 -> 0.01" in text for text in reporter.messages)


# --- what may not get lost


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def copy_of(finished, tmp_path):
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("damage", ["truncated", "bit", "text", "empty"])
@pytest.mark.parametrize("resume", ["auto", "file"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(finished, tmp_path, damage, resume):
    out = copy_of(finished, tmp_path)
    path = out / "checkpoint-last.pt"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        content[largest.header_offset + 400] ^= 4
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"hello", "empty": b""}.get(damage, content))
    before = snapshot(out)
    with pytest.raises(CheckpointError, match=f"checkpoint {path} is damaged"):
        train(settings(out, resume="auto" if resume == "auto" else str(path)), Silent())
    assert snapshot(out) == before


def test_a_missing_checkpoint_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path / 'gone.pt'} does not exist"):
        train(settings(tmp_path / "out", resume=str(tmp_path / "gone.pt")), Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_something_else_is_refused(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    before = snapshot(out)
    with pytest.raises(CheckpointError, match=r"another network \(they differ in name\).*'resnet20'.*'resnet32'"):
        train(settings(out, model="resnet32"), Silent())
    with pytest.raises(CheckpointError, match=r"they differ in num_classes"):
        train(settings(out, num_classes=12), Silent())
    with pytest.raises(DataError, match="other data or settings"):
        train(settings(out, batch_size=16), Silent())
    torch.save({"weights": torch.zeros(3)}, out / "checkpoint-last.pt")
    with pytest.raises(CheckpointError, match="is not a fastres checkpoint"):
        train(settings(out), Silent())
    state = checkpoint.load_checkpoint(out / "checkpoint-best.pt")
    torch.save({**state, "format": 0}, out / "checkpoint-last.pt")
    with pytest.raises(CheckpointError, match="is not a fastres checkpoint of format 1"):
        train(settings(out), Silent())
    (out / "checkpoint-last.pt").write_bytes(before["checkpoint-last.pt"][0])
    assert {k: v[0] for k, v in snapshot(out).items()} == {k: v[0] for k, v in before.items()}


def test_starting_anew_needs_overwrite_and_keeps_the_old(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    before = snapshot(out)
    with pytest.raises(CheckpointError, match=r"--resume never would replace that run.*--overwrite"):
        train(settings(out, resume="never"), Silent())
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere.pt"
    elsewhere.write_bytes(before["checkpoint-last.pt"][0])
    with pytest.raises(CheckpointError, match="would replace that run"):
        train(settings(out, resume=str(elsewhere)), Silent())
    assert snapshot(out) == before
    for number in ("", "1"):
        train(settings(out, resume="never", overwrite=True, epochs=1, seed=5), Silent())
        assert (out / f"checkpoint-last.pt.old{number}").exists()
    assert (out / "checkpoint-last.pt.old").read_bytes() == before["checkpoint-last.pt"][0]
    assert len(read_log(out)) == 1 and outcome(out)["epoch"] == 1
    train(settings(tmp_path / "fresh", resume="never", epochs=1, seed=5), Silent())
    assert equal(outcome(tmp_path / "fresh"), outcome(out))


def test_going_back_to_the_best_keeps_the_last(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    first = checkpoint.load_checkpoint(out / "checkpoint-best.pt")
    run, _ = train(settings(out, resume=str(out / "checkpoint-best.pt"), epochs=3), Silent())
    assert run.epoch == 3 and (out / "checkpoint-last.pt.old").exists() and (out / "checkpoint-best.pt").exists()
    assert len(run.rows) == 3 and run.rows[first["epoch"] - 1].test_acc == first["best"]


def test_writing_fails_without_harm(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match=f"{path} can't be written.*No space left"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    reporter = Silent()
    with pytest.raises(DivergedError, match=r"no longer finite in epoch 1, iteration \d+ \(.*no checkpoint"):
        train(settings(tmp_path, lr=1e30, warmup=0.0), reporter)
    assert not list(tmp_path.glob("*.pt"))
    train(settings(tmp_path, epochs=1), Silent())
    with pytest.raises(DivergedError, match=r"checkpoint-last\.pt still holds the epoch before"):
        train(settings(tmp_path, lr=1e30, warmup=0.0), Silent())
    assert outcome(tmp_path)["epoch"] == 1 and all(v.isfinite().all() for v in outcome(tmp_path)["model"].values())


def test_settings_that_do_not_fit_the_data(tmp_path):
    for changes, message in (
        ({"num_classes": 5}, "num_classes 5 is less than the 10 classes of digits"),
        ({"batch_size": 1000}, "batch size 1000 is more than the 128 training images"),
        ({"device": "cuda:99"} if torch.cuda.is_available() else {"device": "cuda"}, "device|GPU"),
        ({"model": "resnet21"}, "unknown model 'resnet21'"),
    ):
        if "cuda:99" in changes.values():
            continue
        with pytest.raises(UserError, match=message):
            train(settings(tmp_path / "out", **changes), Silent())
    assert not (tmp_path / "out").exists()


def test_evaluation_counts_top5_and_refuses_nothing():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.arange(10.0).expand(len(x), 10)

    class Batches:
        def __init__(self, labels):
            self.labels = labels

        def __iter__(self):
            for part in self.labels.split(4):
                yield torch.zeros(len(part), 1, 2, 2), part

    labels = torch.tensor([9, 9, 8, 7, 6, 5, 4, 0, 1])
    result = evaluate(Constant(), Batches(labels))
    assert (result.top1, result.top5, result.samples) == (pytest.approx(2 / 9), pytest.approx(6 / 9), 9)
    expected = nn.functional.cross_entropy(torch.arange(10.0).expand(9, 10), labels)
    assert result.loss == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(Constant(), [])


def test_logs_that_can_not_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path / 'log.csv'} can't be read"):
        read_log(tmp_path)
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is not the log of a training run"):
        read_log(tmp_path)


def test_without_tensorboard_the_log_is_enough(tmp_path, monkeypatch, finished):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = TensorBoard(tmp_path, 1)
    board.add(finished[1].rows[0])
    board.close()
    assert not board.available and not list(tmp_path.iterdir())


def test_settings_are_plain_values():
    kinds = (str, int, float, bool, list, type(None))
    assert all(isinstance(value, kinds) for value in dataclasses.asdict(Settings("x")).values())
