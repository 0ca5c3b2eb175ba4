"""Evaluation by protocols: exact counts, views, ensembles, population statistics, reports, several processes."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import fastres
from fastres.data import create_loader
from fastres.data.names import imagenet_classes, readable
from fastres.errors import DataError, InputError, UserError
from fastres.evaluate import (
    FolderSource,
    LoaderSource,
    Measures,
    TensorSource,
    assess,
    evaluate,
    make_protocol,
    population_statistics,
)
from fastres.evaluate.protocols import three_squares
from fastres.evaluate.report import confusions, write_files

torch.set_num_threads(2)


class Means(nn.Module):
    """Logits that depend on the whole image, at any size."""

    def __init__(self, classes=4, seed=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, classes, generator=torch.Generator().manual_seed(seed)) * 4)

    def forward(self, x):
        return x.mean((2, 3)) @ self.weight


def images(count=11, side=24, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator), torch.randint(classes, (count,), generator=generator)


def test_measures_are_those_of_a_plain_count_and_merge_over_batches():
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(501, 7, generator=generator)).log_softmax(1)
    labels = torch.randint(7, (501,), generator=generator)
    whole, parts = Measures(7), Measures(7)
    whole.add(scores, labels)
    for part, own in zip(scores.split(64), labels.split(64), strict=True):
        parts.add(part, own)
    s, t = whole.summary(), parts.summary()
    assert s.confusion == t.confusion and s.ece == pytest.approx(t.ece, abs=1e-12)
    confidence, predicted = scores.double().exp().max(1)
    right = predicted == labels
    assert s.samples == 501 and s.top1 == right.double().mean().item()
    assert s.top5 == (scores.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert s.loss == pytest.approx(nn.functional.nll_loss(scores.double(), labels).item())
    for i, row in enumerate(s.classes):
        assert row.support == int((labels == i).sum()) and row.top1 == right[labels == i].double().mean().item()
        assert row.precision == right[predicted == i].double().mean().item()
        assert s.confusion[i] == [int(((labels == i) & (predicted == j)).sum()) for j in range(7)]
    gaps = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        gaps += abs(confidence[inside].sum().item() - right[inside].sum().item())
    assert s.ece == pytest.approx(gaps / 501, abs=1e-9)
    for b in s.calibration:
        inside = (confidence > b.low) & (confidence <= b.high)
        assert b.images == int(inside.sum())
        assert not b.images or b.confidence == pytest.approx(confidence[inside].mean().item())
        assert not b.images or b.accuracy == pytest.approx(right[inside].double().mean().item())


def test_calibration_error_is_that_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(3)
    scores = (2 * torch.randn(800, 10, generator=generator)).log_softmax(1)
    labels = torch.randint(10, (800,), generator=generator)
    measures = Measures(10)
    measures.add(scores, labels)
    s = measures.summary()
    for norm, value in (("l1", s.ece), ("max", s.mce)):
        expected = metrics.multiclass_calibration_error(scores.exp(), labels, 10, n_bins=15, norm=norm)
        assert value == pytest.approx(float(expected), abs=1e-5)
    assert s.confusion == metrics.multiclass_confusion_matrix(scores, labels, 10).tolist()


def test_measures_of_certain_and_absent_classes():
    measures = Measures(3)
    measures.add(torch.tensor([[0.0, -math.inf, -math.inf], [-200.0, 0.0, -200.0]]), torch.tensor([0, 1]))
    s = measures.summary(["a", "b"])
    assert (s.top1, s.ece, s.loss) == (1.0, 0.0, 0.0)
    assert [row.name for row in s.classes] == ["a", "b", "2"]
    assert s.classes[2].top1 is None and s.classes[2].precision is None
    with pytest.raises(UserError, match="nothing to evaluate"):
        Measures(3).summary()
    with pytest.raises(InputError, match=r"expected scores \[2, 3\].*got \[2, 4\]"):
        Measures(3).add(torch.zeros(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "name, count, side",
    [("loader", 1, None), ("1-crop", 1, 224), ("10-crop", 10, 224), ("multi-scale", 10, None), ("144-crop", 144, 224)],
)
def test_protocols_give_the_papers_views(name, count, side):
    protocol = make_protocol(name)
    views = protocol.views(torch.randint(256, (3, 300, 375), generator=torch.Generator().manual_seed(0)).byte())
    assert protocol.count == len(views) == count
    if side:
        assert {tuple(view.shape) for view in views} == {(3, side, side)}
    if name == "multi-scale":
        assert [min(view.shape[1:]) for view in views] == [s for s in (224, 256, 384, 480, 640) for _ in range(2)]
        assert all(torch.equal(views[i + 1], views[i].flip(-1)) for i in range(0, 10, 2))
    if count >= 10:  # every view has its mirror image
        assert all(any(torch.equal(v.flip(-1), w) for w in views) for v in views[:10])


def test_views_are_cut_where_they_should_be():
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(512), indexing="ij")
    image = torch.stack([rows, columns, columns]).float()
    corner = [tuple(v[:2, 0, 0].int().tolist()) for v in make_protocol("10-crop").views(image)]
    assert corner[:5] == [(0, 0), (0, 288), (32, 0), (32, 288), (16, 144)]
    assert [s[1, 0, 0].item() for s in three_squares(image)] == [0, 128, 256]
    assert [s[0, 0, 0].item() for s in three_squares(image.transpose(1, 2).flip(0))] == [0, 128, 256]
    assert make_protocol("1-crop", crop=320).scales == (320,)
    assert make_protocol("1-crop").scales == (256,)
    assert make_protocol("multi-scale", crop=32).scales == (32, 37, 55, 69, 91)


def test_protocols_refuse_what_does_not_fit():
    for given, message in (
        ({"name": "ten-crop"}, "unknown protocol 'ten-crop'; expected loader, 1-crop"),
        ({"name": "10crop"}, "Did you mean 10-crop"),
        ({"name": "1-crop", "crop": 0}, "at least 1"),
        ({"name": "loader", "crop": 8}, "takes the loader's view"),
    ):
        with pytest.raises(UserError, match=message):
            make_protocol(**given)
    with pytest.raises(UserError, match="a crop of 64 doesn't fit into images of 32x32"):
        make_protocol("1-crop", crop=64, scales=(32,)).views(torch.zeros(3, 32, 32))


def test_one_view_is_the_plain_evaluation():
    loader = create_loader("digits", "test", batch_size=50)
    torch.manual_seed(0)
    model = fastres.create_model("resnet20", num_classes=10, in_channels=1).train()
    plain = evaluate(model, loader)
    result = assess(model, LoaderSource(loader))
    s = result.summary
    assert (s.top1, s.top5, s.samples) == (plain.top1, plain.top5, plain.samples)
    assert s.loss == pytest.approx(plain.loss, rel=1e-6) and model.training
    assert s.classes[3].name == loader.classes[3]


@pytest.mark.parametrize("combine", ["softmax", "scores"])
def test_views_and_networks_are_averaged(combine):
    x, labels = images()
    models = [Means(seed=0), Means(seed=1)]
    protocol = make_protocol("10-crop", crop=20)
    views = protocol.views(x)
    expected = 0
    for model in models:
        if combine == "softmax":
            expected += torch.stack([model(v).softmax(1) for v in views]).mean(0) / 2
        else:
            expected += torch.stack([model(v) for v in views]).mean(0).softmax(1) / 2
    for batch in (1, 3, 256):
        result = assess(models, TensorSource(x, labels, "abcd", batch), protocol, combine=combine, batch_size=batch)
        loss = nn.functional.nll_loss(expected.log(), labels)
        assert result.summary.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.summary.top1 == (expected.argmax(1) == labels).double().mean().item()
        assert result.networks == 2 and result.protocol.count == 10


def test_assess_refuses_what_does_not_fit():
    x, labels = images()
    source = TensorSource(x, labels, "abcd")
    for given, message in (
        (([], source), "no network"),
        ((Means(3), source), "3 outputs, the data have 4 classes"),
        (([Means(4), Means(5)], source), "differ in outputs"),
        ((Means(), TensorSource(x[:0], labels[:0], "abcd")), "nothing to evaluate"),
    ):
        with pytest.raises(UserError, match=message):
            assess(*given)
    with pytest.raises(UserError, match="combine must be"):
        assess(Means(), source, combine="max")
    for given, message in (
        ((x.byte(), labels), "normalised float images"),
        ((x, labels[:5]), r"int64 labels \[11\]"),
        ((x, labels + 1), "labels reach from 1 to 4, expected 0 to 3"),
    ):
        with pytest.raises(InputError, match=message):
            TensorSource(*given, "abcd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine images of three sizes and four classes."""
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(9):
        place = root / "val" / f"class{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        size = [(40, 50), (50, 40), (44, 44)][number % 3]
        pixels = torch.randint(256, (*size, 3), generator=generator).byte().numpy()
        image_module.fromarray(pixels).save(place / f"{number}.png")
    return root


def test_whole_images_of_a_folder(folder, caplog):
    protocol = make_protocol("multi-scale", scales=(32, 40))
    results = [assess(Means(), FolderSource(str(folder)), protocol, batch_size=size) for size in (1, 7, 500)]
    assert all(r.summary.confusion == results[0].summary.confusion for r in results)
    assert results[0].summary.samples == 9 and [r.support for r in results[0].summary.classes] == [3, 2, 2, 2]
    # Half of the files each: every image is in one share.
    shares = [list(FolderSource(str(folder)).items(protocol, rank, 2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [5, 4]
    assert all(len(item.views) == 4 and item.views[0].shape[0] == 1 for share in shares for item in share)


def test_a_loader_s_crop_is_the_protocol_s(folder):
    loader = create_loader(str(folder), "test", image_size=28, batch_size=4, backend="torchvision")
    own = torch.cat([x for x, _ in loader])
    protocol = make_protocol("1-crop", crop=28)
    cut = torch.cat([item.views[0] for item in FolderSource(str(folder)).items(protocol)])
    assert protocol.scales == (32,) and (own - cut).abs().max() < 1e-5


def test_a_broken_image_is_named_or_left_out(folder, tmp_path, caplog):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    broken = tmp_path / "copy" / "val" / "class1" / "1.png"
    broken.write_bytes(b"nonsense")
    source = FolderSource(str(tmp_path / "copy"))
    with pytest.raises(DataError, match=f"{broken} can't be decoded"):
        assess(Means(), source, make_protocol("1-crop", crop=28))
    source = FolderSource(str(tmp_path / "copy"), on_bad_image="skip")
    assert assess(Means(), source, make_protocol("1-crop", crop=28)).summary.samples == 8
    assert list(source.bad) == [str(broken)] and "left out" in caplog.text


def test_population_statistics_are_the_means_over_batches():
    torch.manual_seed(0)
    model = fastres.create_model("resnet20", num_classes=4, in_channels=1).eval()
    batches = [(torch.randn(6, 1, 32, 32), None) for _ in range(3)]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    stem = nn.functional.conv2d
    outputs = [
        stem(x, next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight, padding=1) for x, _ in batches
    ]
    done = []
    assert population_statistics(model, batches, step=done.append) == 3
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_mean == pytest.approx(
        torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0).detach(), abs=1e-5
    )
    assert norm.running_var == pytest.approx(
        torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0).detach(), rel=1e-4
    )
    assert done == [6, 12, 18] and norm.momentum == 0.1 and not model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_population_statistics_that_fail_change_nothing():
    model = fastres.create_model("resnet20", num_classes=4, in_channels=1)
    model(torch.randn(4, 1, 32, 32))  # fresh statistics would look like those that a pass begins with
    model.eval()
    before = {name: b.clone() for name, b in model.named_buffers()}

    def broken():
        yield torch.randn(4, 1, 32, 32), None
        raise DataError("no more")

    with pytest.raises(DataError):
        population_statistics(model, broken())
    with pytest.raises(UserError, match="at least one batch"):
        population_statistics(model, [])
    with pytest.raises(UserError, match="no BatchNorm"):
        population_statistics(Means(), [])
    with pytest.raises(UserError, match="frozen"):
        population_statistics(model.freeze_bn(), [])
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers()) and not model.training
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_names_of_imagenet():
    pytest.importorskip("torchvision")
    names = imagenet_classes()
    assert len(names) == 1000 and names[0] == "tench" and names[999] == "toilet tissue"
    folders = [f"n{number:08d}" for number in range(1000)]
    shown = readable(folders)
    assert shown[0] == "tench" and len(set(shown)) == 1000
    assert readable(folders[:10]) == folders[:10] and readable(["a"] * 1000) == ["a"] * 1000


def test_files_hold_the_figures(tmp_path):
    x, labels = images(40)
    result = assess(Means(), TensorSource(x, labels, ["a", "b & c", "<d>", "e"]), "loader")
    paths = write_files(tmp_path / "new", result, {"network": "means <1>"}, "means & co")
    saved = json.loads(paths[0].read_text())
    assert saved["top1"] == result.summary.top1 and saved["network"] == "means <1>" and saved["views"] == 1
    assert saved["confusion"] == result.summary.confusion and len(saved["calibration"]) == 15
    rows = list(csv.reader(paths[2].read_text().splitlines()))
    assert rows[0][1:] == ["a", "b & c", "<d>", "e"]
    assert [[int(c) for c in row[1:]] for row in rows[1:]] == result.summary.confusion
    assert sum(int(row["images"]) for row in csv.DictReader(paths[1].read_text().splitlines())) == 40
    page = paths[4].read_text()
    assert "&lt;d&gt;" in page and "<d>" not in page and "means &amp; co" in page
    assert "http" not in page.replace("http://www.w3.org", "") and page.count("data:image/svg+xml") == 2
    worst = confusions(result.summary)
    assert worst == sorted(worst, key=lambda error: -error[2])
    assert sum(error[2] for error in worst) == 40 - round(result.summary.top1 * 40)


def test_a_thousand_classes_can_be_drawn(tmp_path):
    measures = Measures(1000)
    measures.add(torch.randn(64, 1000).log_softmax(1), torch.arange(64))
    from fastres.evaluate.report import draw_confusion

    assert b"<svg" in draw_confusion(measures.summary())


WORKER = """
    import sys, json, torch, torch.distributed as dist
    from torch import nn
    sys.path.insert(0, sys.argv[1])
    from test_evaluate import Means, images
    import fastres
    from fastres.evaluate import TensorSource, assess, population_statistics
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counts = []
    for size in (11, 1):
        x, labels = images(size)
        source = TensorSource(x, labels, "abcd", 2)
        s = assess(Means(), source, "loader").summary
        counts.append([s.samples, s.confusion, s.loss, s.ece])
    torch.manual_seed(0)
    model = fastres.create_model("resnet20", num_classes=4, in_channels=1)
    batches = [(torch.randn(4, 1, 32, 32), None) for _ in range(3)]
    population_statistics(model, batches[rank::2])
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    print("RESULT", json.dumps([counts, norm.running_mean.tolist(), norm.running_var.tolist()]), flush=True)
    dist.destroy_process_group()
"""


def test_uneven_and_empty_shares_of_two_processes_count_exactly(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    root = str(Path(__file__).parent)
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(root).parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), root], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    results = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        results.append(json.loads(next(line for line in out.splitlines() if line.startswith("RESULT"))[7:]))
    assert results[0] == results[1]
    for size, (samples, confusion, loss, ece) in zip((11, 1), results[0][0], strict=True):
        x, labels = images(size)
        s = assess(Means(), TensorSource(x, labels, "abcd"), "loader").summary
        assert samples == size and confusion == s.confusion
        assert loss == pytest.approx(s.loss, rel=1e-6) and ece == pytest.approx(s.ece, abs=1e-6)
    torch.manual_seed(0)
    model = fastres.create_model("resnet20", num_classes=4, in_channels=1)
    population_statistics(model, [(torch.randn(4, 1, 32, 32), None) for _ in range(3)])
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert results[0][1] == pytest.approx(norm.running_mean.tolist(), rel=1e-4, abs=1e-6)
    assert results[0][2] == pytest.approx(norm.running_var.tolist(), rel=1e-4)
