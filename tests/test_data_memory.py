"""Data sets in memory: digits, Fashion-MNIST's files, order, augmentation, resuming."""

import gzip
import hashlib

import numpy as np
import pytest
import torch

from fastres.data import Loader, create_loader, fashion_mnist
from fastres.data.digits import load_digits
from fastres.data.memory import Arrays, MemoryLoader
from fastres.data.sampling import epoch_generator
from fastres.errors import DataError, UserError


def bits(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def test_digits_batches_and_split():
    train, test = create_loader("digits", "train", batch_size=64), create_loader("digits", "test", batch_size=100)
    assert isinstance(train, Loader) and isinstance(test, Loader)
    assert train.samples + test.samples == 1797 and train.input_shape == (1, 32, 32) and train.num_classes == 10
    arrays = load_digits()
    shares = arrays.test_labels.bincount() / (arrays.test_labels.bincount() + arrays.train_labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01, "the split is stratified"
    batches = bits(test)
    assert len(batches) == len(test) == 4 and sum(len(labels) for _, labels in batches) == test.samples
    assert torch.equal(torch.cat([labels for _, labels in batches]), arrays.test_labels), "test order is the set's own"
    images, labels = batches[0]
    assert images.shape == (100, 1, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64


@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_channels_last_without_a_copy(augment):
    images, _ = next(iter(create_loader("digits", batch_size=8, augment=augment)))
    assert images.stride(1) == 1 and images.is_contiguous(memory_format=torch.channels_last)
    assert images.permute(0, 2, 3, 1).is_contiguous()


def test_order_and_augmentation_depend_on_seed_and_epoch_only():
    loader = create_loader("digits", batch_size=100, seed=3)
    first = bits(loader)
    loader.set_epoch(5)
    fifth = bits(loader)
    assert not same(first, fifth)
    assert torch.equal(torch.cat([b for _, b in first]).bincount(), torch.cat([b for _, b in fifth]).bincount())
    other = create_loader("digits", batch_size=100, seed=3)
    other.set_epoch(5)
    torch.manual_seed(99)
    assert same(bits(other), fifth), "neither history nor global generators matter"
    different = create_loader("digits", batch_size=100, seed=4)
    different.set_epoch(5)
    assert not same(bits(different), fifth)


def test_resuming_in_the_middle_of_an_epoch_changes_no_bit():
    loader = create_loader("digits", batch_size=100, seed=1)
    loader.set_epoch(2)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    state, rest = loader.state_dict(), bits(iterator)
    resumed = create_loader("digits", batch_size=100, seed=1)
    resumed.load_state_dict(state)
    assert same(bits(resumed), rest)
    resumed.set_epoch(2)
    assert len(bits(resumed)) == len(loader), "the position holds for one iteration"


def test_a_position_in_other_data_is_refused():
    state = create_loader("digits", batch_size=100).state_dict()
    for options in ({"batch_size": 50}, {"batch_size": 100, "seed": 1}, {"batch_size": 100, "limit": 50}):
        with pytest.raises(DataError, match="other data or settings"):
            create_loader("digits", **options).load_state_dict(state)


def test_augmentation_is_pad_crop_and_mirror():
    arrays = load_digits(16)
    arrays = arrays.__class__(**{**vars(arrays), "flip": True})
    options = {"batch_size": 7, "seed": 5, "normalize": "pixel", "device": torch.device("cpu"), "drop_last": False}
    got, _ = next(iter(MemoryLoader(arrays, "train", augment=True, limit=None, **options)))
    count, pad = len(arrays.train_labels), arrays.pad
    generator = epoch_generator(5, 0)
    order = torch.randperm(count, generator=generator)
    shifts = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    mirror = torch.rand(count, generator=generator) < 0.5
    scaled = arrays.train_images.float() / 255
    mean, std = scaled.mean(0), scaled.std(unbiased=False)
    assert mirror[:7].any() and not mirror[:7].all()
    for i in range(7):
        padded = torch.zeros(16 + 2 * pad, 16 + 2 * pad)
        padded[pad:-pad, pad:-pad] = ((scaled[order[i]] - mean) / std)[..., 0]
        (top, left), size = shifts[i].tolist(), 16
        crop = padded[top : top + size, left : left + size]
        torch.testing.assert_close(got[i, 0], crop.flip(1) if mirror[i] else crop)


def test_pixel_mean_is_the_mean_image_and_channel_padding_is_black():
    everything = create_loader("digits", batch_size=2000, augment=False, normalize="pixel")
    images, _ = next(iter(everything))
    assert images.mean(0).abs().max() < 1e-5
    # Grey and white images: nothing but the padding is black.
    light = torch.tensor([100, 255], dtype=torch.uint8).repeat(32)[:, None, None, None].expand(64, 8, 8, 1).contiguous()
    labels = torch.zeros(64, dtype=torch.int64)
    arrays = Arrays("light", "the test", ["a"], light, labels, light, labels, pad=2, flip=False)
    options = {"batch_size": 64, "seed": 0, "augment": True, "device": torch.device("cpu"), "drop_last": False}
    images, _ = next(iter(MemoryLoader(arrays, "train", normalize="channel", limit=None, **options)))
    scaled = light.float() / 255
    assert images.min() == pytest.approx(float(-scaled.mean() / scaled.std(unbiased=False)), rel=1e-5)


def test_drop_last_and_limit():
    loader = create_loader("digits", batch_size=100, drop_last=True)
    assert len(loader) == 14 and [len(labels) for _, labels in loader] == [100] * 14
    limited = create_loader("digits", batch_size=100, limit=150)
    assert limited.samples == 150 and [len(labels) for _, labels in limited] == [100, 50]
    assert torch.cat([labels for _, labels in limited]).unique().numel() == 10


def test_wrong_arguments_are_explained():
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        create_loader("digits", batch_size=0)
    with pytest.raises(UserError, match=r"28x28.*got image_size 64"):
        create_loader("fashion-mnist", image_size=64)


# --- Fashion-MNIST's files


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The four files in the right shapes with made-up content, two of them compressed."""
    root = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for name, shape in fashion_mnist.SHAPES.items():
        small = rng.integers(0, 10, (100, *shape[1:])) * (25 if len(shape) == 3 else 1)
        content = idx(np.tile(small, (shape[0] // 100,) + (1,) * (len(shape) - 1)))
        if "train" in name:
            (root / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (root / name).write_bytes(content)
    return root


def test_fashion_mnist_is_read_and_padded(folder):
    loader = create_loader("fashion-mnist", "test", batch_size=10000, data_dir=folder)
    images, labels = next(iter(loader))
    assert images.shape == (10000, 1, 32, 32) and loader.samples == 10000 and len(loader.classes) == 10
    raw = fashion_mnist.read_idx(folder / "t10k-images-idx3-ubyte")
    assert labels.tolist() == fashion_mnist.read_idx(folder / "t10k-labels-idx1-ubyte").tolist()
    inside, black = images[:, 0, 2:30, 2:30], images[0, 0, 0, 0]
    assert torch.all(images[:, :, :2] == black) and torch.all(images[:, :, :, 30:] == black)
    scaled = torch.from_numpy(raw.copy()).float() / 255
    slope = (inside.max() - inside.min()) / (scaled.max() - scaled.min())
    torch.testing.assert_close(inside, black + slope * scaled, rtol=1e-4, atol=1e-4)
    small = create_loader("fashion-mnist", "test", batch_size=5, data_dir=folder, image_size=28)
    assert next(iter(small))[0].shape == (5, 1, 28, 28)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an IDX file"),
        (b"hello, world", "not an IDX file"),
        (idx(np.zeros((3, 2)))[:-1], "incomplete"),
        (gzip.compress(idx(np.zeros((300, 28))))[:-20], "can't be read"),
        (gzip.compress(b"x" * 100)[:15], "can't be read"),
    ],
    ids=(
        "empty",
        "text",
        "short",
        "cut gzip",
        "shorter gzip",
    ),  # gzip writes the time: the contents name no test twice alike
)
def test_damaged_idx_files_are_named(tmp_path, content, reason):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}.*{reason}"):
        fashion_mnist.read_idx(path)


def test_a_file_of_another_shape_is_named(folder, tmp_path):
    for name in fashion_mnist.SHAPES:
        (tmp_path / name).write_bytes(idx(np.zeros((5, 28, 28) if "images" in name else (5,))))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte has shape \(5, 28, 28\), expected \(60000, 28, 28\)"):
        create_loader("fashion-mnist", data_dir=tmp_path)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No system folders, an empty cache, and a 'server' that is a folder."""
    server = tmp_path / "server"
    server.mkdir()
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDERS", (tmp_path / "system",))
    monkeypatch.setattr(fashion_mnist, "URL", server.as_uri() + "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return server


def test_every_place_that_was_looked_at_is_listed(nowhere, tmp_path):
    with pytest.raises(DataError) as error:
        fashion_mnist.find_files()
    for place in (tmp_path / "system", tmp_path / "cache" / "fastres" / "fashion-mnist", "server/", "--data-dir"):
        assert str(place) in str(error.value)
    with pytest.raises(DataError, match=r"looked at: .*given \(does not exist\)"):
        fashion_mnist.find_files(tmp_path / "given")


def test_downloads_are_checked_and_kept(nowhere, tmp_path, monkeypatch):
    contents = {name: gzip.compress(name.encode()) for name in fashion_mnist.SHA256}
    for name, content in contents.items():
        (nowhere / f"{name}.gz").write_bytes(content)
    cache = tmp_path / "cache" / "fastres" / "fashion-mnist"
    with pytest.raises(DataError, match="wrong checksum"):
        fashion_mnist.find_files()
    assert list(cache.iterdir()) == [], "what is wrong is not kept"
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", sums)
    found = fashion_mnist.find_files()
    assert {path.read_bytes() for path in found.values()} == set(contents.values())
    monkeypatch.setattr(fashion_mnist, "URL", (tmp_path / "gone").as_uri() + "/")
    assert fashion_mnist.find_files() == found, "the second time nothing is fetched"
