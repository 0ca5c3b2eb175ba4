"""The command: what each subcommand prints and writes, exit codes, one-line errors."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import require

import fastres
from fastres.cli import main
from fastres.evaluate import parity
from fastres.ops.schemas import OPS
from fastres.train.records import read_log

# torchvision has announced the end of its decoders; the loader goes on with Pillow then.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
SMALL = ["--epochs", "2", "--batch-size", "32", "--image-size", "16", "--limit", "96"]


def command(capsys, *arguments):
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line that a user's mistake gives."""
    code, out, err = command(capsys, *arguments)
    assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in out + err, err
    return err.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "resnet20", "--out", str(out), *SMALL]) == 0
    return out


def test_help_and_version_are_quick():
    program = (
        "import sys, fastres.cli\ntry: fastres.cli.main(sys.argv[1:])\nfinally:\n"
        " heavy = {'torchvision', 'nvidia.dali', 'matplotlib', 'sklearn', 'scipy', 'tensorboard', 'torch._dynamo', 'triton'}\n"
        " print('LOADED', sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["--help"], ["--version"], ["train", "--help"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and "LOADED []" in done.stderr, done.stderr
        assert ("usage: fastres" in done.stdout) == ("--help" in arguments)
    module = subprocess.run([sys.executable, "-m", "fastres", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout.strip() == f"fastres {fastres.__version__}"


def test_train_writes_everything_and_continues(trained, capsys):
    names = {path.name.split(".")[0] for path in trained.iterdir()}
    assert {"log", "checkpoint-last", "checkpoint-best", "config", "events"} <= names
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"] == "resnet20" and config["epochs"] == 2 and config["lr"] == 0.1 and config["fused"] is True
    code, out, _ = command(capsys, "train", "--config", trained / "config.yaml", "--epochs", 3)
    assert code == 0 and "continuing from" in out and "epochs 2 -> 3" in out
    assert re.search(r"epoch 3/3 .*train loss \d.*test loss .*images/s +data wait", out)
    assert re.search(r"best +│ +\d", out) and len(read_log(trained)) == 3
    code, out, _ = command(capsys, "train", "resnet20", "--out", trained, *SMALL[:1], "3", *SMALL[2:])
    assert code == 0 and "after epoch 3" in out and "epoch 4" not in out, "nothing is left to do"


def test_eval_of_a_checkpoint(trained, capsys, tmp_path):
    expected = read_log(trained)
    code, out, _ = command(
        capsys, "eval", trained / "checkpoint-last.pt", "--limit", 96, "--batch-size", 7, "--json", tmp_path / "f.json"
    )
    figures = json.loads((tmp_path / "f.json").read_text())
    assert code == 0 and figures["samples"] == 96 and f"{figures['top1']:.2%}" in out
    assert figures["top1"] == pytest.approx(expected[-1].test_acc, abs=1e-6)
    assert figures["loss"] == pytest.approx(expected[-1].test_loss, rel=1e-4), "at the image size of the training"
    code, out, _ = command(capsys, "eval", trained / "checkpoint-last.pt", "--no-fused", "--limit", 96)
    assert code == 0 and "resnet20 (reference)" in out and f"{figures['top1']:.2%}" in out


def test_eval_by_protocol_of_an_ensemble_with_a_report(trained, capsys, tmp_path):
    require("torchvision")
    require("matplotlib")
    last, best = trained / "checkpoint-last.pt", trained / "checkpoint-best.pt"
    small = ["--limit", 96, "--protocol", "10-crop", "--out", tmp_path / "report"]
    code, out, _ = command(capsys, "eval", last, "--ensemble", best, *small, "--population-bn", "--combine", "scores")
    figures = json.loads((tmp_path / "report" / "eval.json").read_text())
    assert code == 0 and (figures["views"], figures["crop"], figures["networks"]) == (10, 16, 2)
    assert figures["samples"] == 96 and f"{figures['top1']:.2%}" in out and "10 (10-crop)" in out
    assert "by class" in out and "most frequent confusions" in out and figures["population_bn"] is True
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".html", ".json", ".csv"}
    assert "unknown protocol 'five'" in fails(capsys, "eval", last, "--protocol", "five")


def test_eval_takes_the_average_of_weights_that_the_training_evaluated(capsys, tmp_path):
    small = ["--batch-size", 32, "--image-size", 16, "--limit", 96, "--epochs", 1]
    assert command(capsys, "train", "resnet20", "--out", tmp_path, *small, "--ema", 0.5, "--ema-every", 1)[0] == 0
    last = tmp_path / "checkpoint-last.pt"
    assert command(capsys, "eval", last, "--limit", 96, "--json", tmp_path / "f.json")[0] == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["loss"] == pytest.approx(read_log(tmp_path)[-1].test_loss, rel=1e-4)


def test_eval_of_several_processes_is_that_of_one(trained, capsys, tmp_path):
    last = str(trained / "checkpoint-last.pt")
    code, _, _ = command(capsys, "eval", last, "--limit", 90, "--batch-size", 32, "--json", tmp_path / "one.json")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastres"]
    options = [
        "eval",
        last,
        "--limit",
        "90",
        "--batch-size",
        "32",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "two.json"),
    ]
    done = subprocess.run([*torchrun, *options], capture_output=True, text=True)
    assert code == 0 and done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["confusion"] == two["confusion"] and two["processes"] == 2 and two["samples"] == 90
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6) and done.stdout.count("most frequent confusions") == 1


def test_a_terminal_gets_a_bar(capsys):
    import io

    from rich.console import Console

    from fastres.train.progress import BarReporter, PlainReporter, make_reporter
    from fastres.train.records import Row

    row = Row(1, 10, 0.1, 1.5, 0.5, 1.25, 0.75, 100.0, 0.02, 3.0, 3.0)
    for terminal, kind in ((True, BarReporter), (False, PlainReporter)):
        text = io.StringIO()
        reporter = make_reporter(Console(file=text, force_terminal=terminal, width=200))
        assert isinstance(reporter, kind)
        reporter.begin_epoch(1, 2, 10, 0)
        reporter.step(5, 1.234, 0.5, 321.0, 0.035)
        if terminal:
            reporter._progress.refresh()
        reporter.message("an image was left out")
        reporter.end_epoch(row, 2, best=True)
        reporter.close()
        assert "an image was left out" in text.getvalue() and "75.00% *" in text.getvalue()
        for figure in ("loss 1.234", "acc 50.0%", "321 img/s", "data wait 3.5%"):
            assert (figure in text.getvalue()) == terminal, figure


def test_models_lists_and_filters(capsys):
    code, out, _ = command(capsys, "models")
    assert code == 0 and all(name in out for name in fastres.list_models())
    code, out, _ = command(capsys, "models", "resnet5*")
    assert code == 0 and "25,557,032" in out and "resnet56" in out and "resnet18" not in out
    row = next(line for line in out.splitlines() if "resnet50" in line)
    assert "4,089,184,256" in row and "22.85 / 6.71 (10-crop, v1)" in row and re.search(r"│ yes +│", row), out
    assert "no network matches 'vgg99'" in fails(capsys, "models", "vgg99")


def test_explain_names_backends(capsys):
    code, out, _ = command(capsys, "explain", "resnet20", "--mode", "train")
    assert code == 0 and "conv_stats" in out and ("library" in out or "native" in out)


def test_bench_checks_parity_and_writes_json(capsys, tmp_path):
    arguments = ("bench", "resnet20", "--batch-size", 4, "--rounds", 3, "--threads", 2, "--json", tmp_path / "b.json")
    code, out, _ = command(capsys, *arguments)
    content = json.loads((tmp_path / "b.json").read_text())
    assert code == 0 and [r["mode"] for r in content["results"]] == ["forward", "step"]
    for result in content["results"]:
        assert result["parity_error"] <= result["parity_allowed"]
        for key in ("reference_s", "fused_s", "speed_up"):
            assert 0 < result[key]["low"] <= result[key]["median"] <= result[key]["high"]
    assert content["machine"]["torch"] == torch.__version__ and "speed-up" in out


def test_bench_gives_no_figure_where_parity_fails(capsys, monkeypatch, tmp_path):
    from fastres.cli import bench

    honest = bench.make_pair

    def wrong(options, device):
        fused, plain, images, labels = honest(options, device)
        with torch.no_grad():
            fused.fc.bias[0] += 0.01
        return fused, plain, images, labels

    monkeypatch.setattr(bench, "make_pair", wrong)
    code, out, _ = command(capsys, "bench", "resnet20", "--batch-size", 2, "--rounds", 1, "--json", tmp_path / "b.json")
    assert code == 1 and out.count("FAILED") == 2
    assert all("speed_up" not in result for result in json.loads((tmp_path / "b.json").read_text())["results"])


def test_doctor_compares_every_op(capsys):
    code, out, _ = command(capsys, "doctor")
    assert code == 0 and "0 failed" in out and "FAILED" not in out
    words = ("torch", "nvidia.dali", "reference", "native", "conv_stats", "scale_shift_act_pool", "bfloat16", "not run")
    assert all(word in out for word in words)


def test_doctor_compares_gradients_too():
    for op, (function, arguments) in parity._cases():
        found = parity._outcome((function, arguments), torch.float32, "cpu", "reference")
        results = {"conv_stats": 3, "batch_norm_act": 3}.get(op, 1)
        assert [t.shape for t in found[results:]][:2] == [a.shape for a in arguments[:2]], op


@pytest.mark.parametrize("wrong", ["forward", "gradient"])
def test_doctor_fails_when_an_op_disagrees(capsys, monkeypatch, wrong):
    honest = parity._outcome

    def broken(case, dtype, device, backend):
        results = honest(case, dtype, device, backend)
        if backend == "library" and dtype == torch.float32:
            chosen = results[0 if wrong == "forward" else -1]
            chosen[(0,) * chosen.dim()] += 0.1
        return results

    monkeypatch.setattr(parity, "_outcome", broken)
    code, out, _ = command(capsys, "doctor")
    assert code == 1 and out.count("FAILED") == len(OPS), "one row an op"


def test_doctor_says_that_the_gpu_kernels_were_not_compared(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parity, "op_parity", lambda device: [])
    _, out, _ = command(capsys, "doctor")
    assert "No GPU was compared" in out and "make gpu" in out


def test_doctor_on_a_gpu_machine_compares_every_backend_there(capsys, monkeypatch):
    """The devices that torch would see, and the table: reference, library, triton and cuda, by dtype."""
    asked = []

    def matrix(device):
        asked.append(device)
        if device == "cpu":
            return []
        row = parity.Parity("conv_stats", "triton", device, "float16", 1e-4, 2e-4)
        raised = parity.Parity("conv_stats", "cuda", device, "tf32", raised="launch failed [x] on cuda:0")
        return [row, raised, parity.Parity("conv_act", "cuda", device, "bfloat16", 0.1, 1e-3)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "GPU X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(parity, "op_parity", matrix)
    code, out, _ = command(capsys, "doctor")
    assert code == 1 and asked == ["cpu", "cuda"] and "3 comparisons, 2 failed" in out and "No GPU" not in out
    assert "FAILED: launch failed" in " ".join(out.split()) and "1.0e-04" in out and "GPU X" in out


def test_the_matrix_takes_backends_and_dtypes(monkeypatch):
    rows = parity.op_parity("cpu", ("reference", "library"), ("float32",))
    assert {(r.what, r.backend) for r in rows} == {(op, b) for op in OPS for b in ("reference", "library")}
    assert not any(r.failed for r in rows) and all(r.reason is None for r in rows)
    (row, *_) = parity.op_parity("cpu", ("native",), ("float16",))
    assert "not float16" in row.reason and not row.failed
    assert parity.ROWS_OF["cuda"] == ("float32", "tf32", "bfloat16", "float16")


def test_a_backend_that_raises_has_failed_and_the_rest_still_runs(monkeypatch):
    honest, before = parity._outcome, torch.backends.cudnn.conv.fp32_precision

    def broken(case, dtype, device, backend):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        if backend == "library":
            raise RuntimeError("out of resource")
        return honest(case, dtype, device, backend)

    monkeypatch.setattr(parity, "_outcome", broken)
    rows = parity.op_parity("cpu", ("library", "native"), ("float32",))
    assert all(r.failed == (r.backend == "library") for r in rows) and len(rows) == sum(
        b in s.backends for s in OPS.values() for b in ("library", "native")
    )
    assert rows[0].raised == "out of resource"
    assert torch.backends.cudnn.conv.fp32_precision == before, "what was set is put back"


def test_plot_draws_several_runs(trained, capsys, tmp_path):
    require("matplotlib")
    for name in ("curves.png", "curves.svg"):
        code, out, _ = command(capsys, "plot", trained, trained, "-o", tmp_path / name)
        assert code == 0 and name in out and (tmp_path / name).stat().st_size > 10000
    for style in ("fig1", "fig4", "fig6"):
        assert command(capsys, "plot", trained, "--style", style, "-o", tmp_path / f"{style}.png")[0] == 0
    assert command(capsys, "plot", trained, trained, "-o", tmp_path / "runs.html")[0] == 0
    assert (trained / "report.html").read_text().startswith("<!doctype html>"), "training ends with a report"
    assert "log.csv can't be read" in fails(capsys, "plot", tmp_path)
    assert "can't write" in fails(capsys, "plot", trained, "-o", tmp_path / "curves.xyz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "resnet21"], "unknown model 'resnet21'; close to resnet"),
        (["train", "resnet20", "--lr", "fast"], "lr.*could not convert string to float: 'fast'"),
        (["train", "resnet20", "--epochs", "0"], "epochs.*0"),
        (["train", "resnet20", "--dtype", "fp8"], "dtype.*fp8"),
        (["train", "resnet20", "--bogus"], "--bogus"),
        (["train", "resnet20", "--data", "/nowhere"], "/nowhere does not exist; expected ROOT/train"),
        (["train", "resnet20", "--resume", "/nowhere.pt"], "checkpoint /nowhere.pt does not exist"),
        (["train", "resnet20", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (
            ["train", "resnet20", "--data", "fashion-mnist", "--data-dir", "/nowhere"],
            "looked at: /nowhere .does not exist",
        ),
        (["train"], "model"),
        (["eval", "/nowhere.pt"], "checkpoint /nowhere.pt does not exist"),
        (["eval", "resnet20", "--data", "digits"], "resnet20 without --weights is untrained"),
        (["eval", "resnet99", "--data", "digits"], "unknown model 'resnet99'"),
        (["bench", "resnet99"], "unknown model 'resnet99'"),
        (["explain", "resnet99"], "unknown model 'resnet99'"),
        (["dance"], "dance"),
        ([], "train"),
    ],
)
def test_mistakes_give_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails(capsys, *arguments))
    assert list(tmp_path.iterdir()) == []


def test_traceback_on_request(capsys):
    code, _, err = command(capsys, "train", "resnet21", "--traceback")
    assert code == 2 and "Traceback" in err and "ModelError" in err


def test_a_broken_image_is_reported(capsys, tmp_path):
    io = require("torchvision.io")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(6):
                pixels = torch.randint(0, 255, (3, 40, 40), dtype=torch.uint8)
                io.write_jpeg(pixels, str(tmp_path / "data" / split / name / f"{index}.jpg"))
    bad = tmp_path / "data" / "train" / "a" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    arguments = ["train", "resnet20", "--data", tmp_path / "data", "--image-size", "32", "--batch-size", "4"]
    arguments += ["--epochs", "1"]
    line = fails(capsys, *arguments, "--out", tmp_path / "stop")
    assert f"{bad} can't be decoded" in line and "--on-bad-image=skip" in line
    code, out, _ = command(capsys, *arguments, "--out", tmp_path / "skip", "--on-bad-image", "skip")
    assert code == 0 and f"warning: left out {bad}" in out and "(1 bad images so far)" in out and "decoded by" in out


def test_sigterm_saves_and_exits(tmp_path):
    arguments = [sys.executable, "-u", "-m", "fastres", "train", "resnet20", "--out", str(tmp_path)]
    arguments += ["--image-size", "16", "--epochs", "1000", "--batch-size", "32", "--limit", "96", "--threads", "1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and err == "", err
    assert "stopped by SIGTERM" in out and "the same command continues" in out
    from fastres.train.checkpoint import load_checkpoint

    assert load_checkpoint(tmp_path / "checkpoint-last.pt")["iteration"] > 0


def test_a_closed_pipe_is_quiet():
    program = f"{sys.executable} -m fastres models | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
