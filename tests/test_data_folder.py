"""Folders of images: both engines against torchvision's own classes, broken files, resuming."""

import logging
import threading
import time

import numpy as np
import pytest
import torch
from conftest import require

from fastres.data import create_loader, engine, geometry
from fastres.data.folder import read_ahead
from fastres.data.scan import scan
from fastres.errors import DataError, UserError

# torchvision has announced the end of its decoders; the loader goes on with Pillow then.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
TRAIN, TEST = {"cat": 9, "ant": 11, "bee": 7}, {"cat": 5, "ant": 4, "bee": 6}


def write_image(path, seed, height=None, width=None):
    """A smooth random picture, of a random size, as JPEG."""
    io = require("torchvision.io")
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(70, 160, (2,), generator=generator).tolist()
    coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (height or sizes[0], width or sizes[1]), mode="bicubic")
    io.write_jpeg(fine[0].clamp(0, 255).byte(), str(path), quality=90)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    seed = 0
    for split, counts in (("train", TRAIN), ("val", TEST)):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                seed += 1
                write_image(root / split / name / f"{index}.jpg", seed)
    return root


@pytest.fixture(params=["torchvision", "dali"])
def backend(request):
    require("torchvision")
    if request.param == "dali":
        require("nvidia.dali")
    return request.param


def open_folder(root, split="train", backend="auto", **options):
    return create_loader(root, split, backend=backend, image_size=48, **{"batch_size": 4, "seed": 2, **options})


def collect(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def test_evaluation_equals_torchvision_pixel_by_pixel(images, backend):
    datasets, v2 = require("torchvision.datasets"), require("torchvision.transforms.v2")
    steps = [v2.PILToTensor(), v2.Resize(55, antialias=True), v2.CenterCrop(48), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    reference = datasets.ImageFolder(images / "val", v2.Compose(steps))
    loader = open_folder(images, "test", backend)
    assert loader.classes == reference.classes == ["ant", "bee", "cat"]
    batches = collect(loader)
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 3] and len(loader) == 4 and loader.samples == 15
    assert torch.cat([labels for _, labels in batches]).tolist() == reference.targets
    got, expected = torch.cat([x for x, _ in batches]), torch.stack([x for x, _ in reference])
    grey_level = 1 / 255 / 0.224
    assert (got - expected).abs().max() <= 0.01 * grey_level, "no grey level differs"
    one = collect(open_folder(images, "test", backend, batch_size=64))
    assert len(one) == 1 and torch.equal(one[0][0], got), "a batch larger than the set delivers each image once"


def test_batches_are_channels_last_without_a_copy(images, backend):
    for split in ("train", "test"):
        pixels, labels = next(iter(open_folder(images, split, backend)))
        assert pixels.shape == (4, 3, 48, 48) and pixels.dtype == torch.float32 and labels.dtype == torch.int64
        assert pixels.is_contiguous(memory_format=torch.channels_last) and not pixels.is_contiguous()
        assert pixels.permute(0, 2, 3, 1).is_contiguous()


def test_training_order_is_a_permutation_that_epochs_change(images, backend):
    loader = open_folder(images, backend=backend)
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append(torch.cat([labels for _, labels in loader]))
        assert orders[-1].bincount().tolist() == [11, 7, 9]
    assert not torch.equal(*orders)
    other = open_folder(images, backend="torchvision")
    other.set_epoch(1)
    assert torch.equal(torch.cat([labels for _, labels in other]), orders[1]), "the order is the same on both engines"
    dropping = open_folder(images, backend=backend, drop_last=True)
    assert [len(labels) for _, labels in dropping] == [4] * 6 and len(dropping) == 6


def test_labels_belong_to_their_images(tmp_path, backend):
    for label, value in enumerate((20, 120, 220)):
        for split in ("train", "val"):
            (tmp_path / split / f"class{label}").mkdir(parents=True)
            for index in range(6):
                flat = torch.full((3, 60, 60), value, dtype=torch.uint8)
                require("torchvision.io").write_jpeg(flat, str(tmp_path / split / f"class{label}" / f"{index}.jpg"))
    for split in ("train", "test"):
        pixels, labels = collect(open_folder(tmp_path, split, backend, batch_size=18))[0]
        grey = (pixels[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255
        torch.testing.assert_close(grey, 20 + 100.0 * labels, rtol=0, atol=1.5)


def test_the_same_seed_and_epoch_give_the_same_bits(images, backend):
    loader = open_folder(images, backend=backend, workers=2)
    loader.set_epoch(3)
    reference = collect(loader)
    again = open_folder(images, backend=backend, workers=1)
    collect(again)
    again.set_epoch(3)
    assert same(collect(again), reference)
    assert not same(collect(open_folder(images, backend=backend, seed=9)), reference)
    crops = torch.cat([x for x, _ in reference])
    loader.set_epoch(4)
    assert not torch.equal(crops.sum((1, 2, 3)).sort()[0], torch.cat([x for x, _ in loader]).sum((1, 2, 3)).sort()[0])


@pytest.mark.parametrize("batches", [1, 3, 6])
def test_resuming_in_the_middle_of_an_epoch_changes_no_bit(images, backend, batches):
    loader = open_folder(images, backend=backend)
    loader.set_epoch(1)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    state, rest = loader.state_dict(), collect(iterator)
    resumed = open_folder(images, backend=backend)
    resumed.load_state_dict(state)
    assert same(collect(resumed), rest) and len(rest) == 7 - batches


def test_a_position_in_other_data_is_refused(images, tmp_path, backend):
    state = open_folder(images, backend=backend).state_dict()
    for name in ("x", "y"):
        (tmp_path / "train" / name).mkdir(parents=True)
        write_image(tmp_path / "train" / name / "0.jpg", 1)
    with pytest.raises(DataError, match="other data or settings"):
        open_folder(tmp_path, backend=backend).load_state_dict(state)


def windows(height, width, count=4000):
    sizes = np.tile([height, width], (count, 1))
    return torch.from_numpy(geometry.place(geometry.Crops(), sizes, np.arange(count), 32, 0, 0).windows).double()


def test_training_crops_are_distributed_as_torchvisions():
    transforms = require("torchvision.transforms.v2")
    theirs = transforms.RandomResizedCrop(32)
    blank = torch.zeros(3, 300, 400)
    own = windows(300, 400)
    made = [theirs.make_params([blank]) for _ in range(4000)]
    other = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in made]).double()
    shapes = own[:, 2] / own[:, 3], other[:, 2] / other[:, 3]
    for mine, reference in ((own, other), (own[:, 2] * own[:, 3], other[:, 2] * other[:, 3]), shapes):
        spread = (mine.var(0) + reference.var(0)).div(4000).sqrt()
        assert torch.all((mine.mean(0) - reference.mean(0)).abs() < 4.5 * spread)
    assert torch.all(own[:, 0] + own[:, 2] <= 300) and torch.all(own[:, 1] + own[:, 3] <= 400)
    thin = windows(10, 2000, 1)[0]
    assert thin[2] == 10 and thin[3] <= 13, "no attempt fits a very wide image: the centre is taken"


# --- broken files


def break_images(root, kinds):
    """Copies of the training set's files in which some are damaged; returns their paths."""
    damaged = []
    for number, kind in enumerate(kinds):
        path = root / "train" / "bee" / f"bad{number}.jpg"
        write_image(path, 100 + number)
        content = path.read_bytes()
        new = {"truncated": content[: len(content) // 2], "text": b"<html>not found</html>", "empty": b""}[kind]
        path.write_bytes(new)
        damaged.append(path)
    return damaged


@pytest.fixture
def own_images(tmp_path):
    for split in ("train", "val"):
        for index, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8):
                write_image(tmp_path / split / name / f"{number}.jpg", 50 * index + number)
    return tmp_path


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_broken_file_stops_with_its_name(own_images, backend, kind):
    (path,) = break_images(own_images, [kind])
    loader = open_folder(own_images, backend=backend)
    with pytest.raises(DataError, match=rf"{path} can't be decoded: .+--on-bad-image=skip"):
        collect(loader)


def test_broken_files_are_skipped_named_and_counted(own_images, backend, caplog):
    damaged = break_images(own_images, ["truncated", "text", "empty"])
    loader = open_folder(own_images, backend=backend, on_bad_image="skip", batch_size=3)
    with caplog.at_level(logging.WARNING, "fastres.data"):
        first = collect(loader)
    assert sum(len(labels) for _, labels in first) == 16 and set(loader.bad) == {str(p) for p in damaged}
    assert torch.cat([labels for _, labels in first]).bincount().tolist() == [8, 8]
    text = caplog.text
    assert all(str(path) in text for path in damaged) and "(3 bad images so far)" in text
    assert loader.samples == 16 and len(loader) == 6
    caplog.clear()
    loader.set_epoch(1)
    assert sum(len(labels) for _, labels in loader) == 16 and not caplog.text, "known ones are left out silently"


@pytest.mark.parametrize("batches", [0, 1, 2, 4])
def test_resuming_around_broken_files_changes_no_bit(own_images, backend, batches):
    break_images(own_images, ["truncated", "empty", "text"])
    loader = open_folder(own_images, backend=backend, on_bad_image="skip", batch_size=3)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    time.sleep(0.3)  # let the reading thread find files that lie ahead: they are not part of the position
    state, rest = loader.state_dict(), collect(iterator)
    resumed = open_folder(own_images, backend=backend, on_bad_image="skip", batch_size=3)
    resumed.load_state_dict(state)
    assert same(collect(resumed), rest)
    assert set(resumed.bad) == set(loader.bad)


def test_nothing_but_broken_files(tmp_path, backend):
    (tmp_path / "train" / "bee").mkdir(parents=True)
    (tmp_path / "train" / "ant").mkdir()
    paths = break_images(tmp_path, ["text", "empty"])
    paths[0].rename(tmp_path / "train" / "ant" / "bad.jpg")
    with pytest.raises(DataError, match=f"none of the 2 images in {tmp_path / 'train'} can be decoded"):
        collect(open_folder(tmp_path, backend=backend, on_bad_image="skip"))


# --- folders that are not what they should be


def test_folders_without_images_are_explained(tmp_path):
    expected = r"expected ROOT/train/<class>/\*\.jpg"
    with pytest.raises(DataError, match=f"{tmp_path / 'gone'} does not exist; {expected}"):
        create_loader(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is not a folder"):
        create_loader(tmp_path / "file")
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{root} has no folder train \(it has the folders cat\); {expected}"):
        create_loader(root)
    (root / "train").mkdir()
    (root / "train" / "loose.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="has no class folders but 1 loose images"):
        create_loader(root)
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"has 1 class folders but no images \(\.jpg"):
        create_loader(root)
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "x.JPEG").write_bytes(b"1")
    with pytest.raises(DataError, match="class folders without images: cat"):
        create_loader(root)
    with pytest.raises(DataError, match="has no folder val or test"):
        create_loader(root, "test")
    with pytest.raises(DataError, match=r"train has one class only, dog; a classifier needs at least two"):
        (root / "train" / "cat" / "notes.txt").unlink()
        (root / "train" / "cat").rmdir()
        create_loader(root)


def test_scanning_follows_the_training_classes(images, tmp_path):
    found = scan(images, "test")
    assert found.classes == ["ant", "bee", "cat"] and found.labels == [0] * 4 + [1] * 6 + [2] * 5
    for place in ("train/a", "train/b", "test/b", "train/a/.hidden", "train/.git", "train/b/folder.jpg"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("train/a/1.PNG", "train/a/._1.jpg", "train/b/2.jpg", "train/b/folder.jpg/3.webp", "test/b/1.jpeg"):
        (tmp_path / place).write_bytes(b"1")
    train = scan(tmp_path, "train")
    assert train.classes == ["a", "b"] and [f.rsplit("/", 1)[1] for f in train.files] == ["1.PNG", "2.jpg", "3.webp"]
    assert scan(tmp_path, "test").labels == [1], "labels are those of training, also where a class is absent"
    assert scan(tmp_path, "train").fingerprint() == train.fingerprint()
    (tmp_path / "train" / "a" / "2.jpg").write_bytes(b"1")
    assert scan(tmp_path, "train").fingerprint() != train.fingerprint()
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(DataError, match=r"classes that .*train lacks: c"):
        scan(tmp_path, "test")


def test_without_dali_torchvision_decodes_and_says_so(images, monkeypatch):
    require("torchvision")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert "decoded by torchvision (DALI can't be imported)" in open_folder(images).description
    import sys

    monkeypatch.setitem(sys.modules, "fastres.data.dali", None)
    with pytest.raises(UserError, match="DALI can't be imported"):
        open_folder(images, backend="dali")


def test_without_torchvisions_decoders_pillow_gives_the_same_pixels(images, monkeypatch):
    import sys

    paths = scan(images, "test").files[:5]
    reference = [engine.decode_file(path) for path in paths]
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    for path, expected in zip(paths, reference, strict=True):
        assert torch.equal(engine.decode_file(path), expected)
    broken = images.parent / "broken.jpg"
    broken.write_text("not an image")
    with pytest.raises(OSError, match="cannot identify"):
        engine.decode_file(str(broken))


def test_reading_ahead_passes_errors_on_and_stops_when_left():
    closed = threading.Event()

    def numbers():
        try:
            for number in range(1000):
                if number == 5:
                    raise ValueError("five")
                yield number
        finally:
            closed.set()

    seen = []
    with pytest.raises(ValueError, match="five"):
        for number in read_ahead(numbers(), 2):
            seen.append(number)
    assert seen == [0, 1, 2, 3, 4] and closed.is_set()
    closed.clear()
    iterator = read_ahead(numbers(), 2)
    assert next(iterator) == 0
    iterator.close()
    assert closed.wait(5) and all(t.name != "fastres-data" for t in threading.enumerate())
