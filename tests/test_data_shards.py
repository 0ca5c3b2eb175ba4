"""Tar shards, TFRecord, RecordIO and CIFAR: what is read equals what was written, and damage is named."""

import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from conftest import require
from data_cases import collect, make_folder, same

from fastres.data import create_loader
from fastres.data.packing import pack
from fastres.data.records import RECORDIO_MAGIC
from fastres.data.scan import open_source
from fastres.errors import DataError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("shards"), ("ant", "bee", "cat"), 6)


def samples(folder, split="train"):
    source = open_source(folder, split)
    return [(source.read(i).tobytes(), source.labels[i]) for i in range(len(source))]


def varint(value):
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(content, label, packed=True, key=b"image/encoded"):
    """A serialised tf.train.Example, as TensorFlow's scripts for ImageNet write it."""
    integers = field(1, varint(label)) if packed else varint(1 << 3) + varint(label)
    features = [
        (b"image/height", field(3, field(1, varint(375)))), (key, field(1, field(1, content))),
        (b"image/class/label", field(3, integers)), (b"image/colorspace", field(1, field(1, b"RGB"))),
        (b"image/scale", field(2, field(1, struct.pack("<f", 0.5)))),
    ]  # fmt: skip
    return field(1, b"".join(field(1, field(1, key) + field(2, value)) for key, value in features))


def write_tfrecord(path, records, **options):
    with open(path, "wb") as file:
        for number, (content, label) in enumerate(records):
            data = example(content, label, packed=number % 2 == 0, **options)
            file.write(struct.pack("<QI", len(data), 0) + data + struct.pack("<I", 0))


def write_recordio(path, records):
    with open(path, "wb") as file:
        for number, (content, label) in enumerate(records):
            several = number % 3 == 0  # as im2rec writes more than one label
            head = struct.pack("<IfQQ", 2 if several else 0, 0 if several else label, number, 0)
            data = head + (struct.pack("<ff", label, 9.0) if several else b"") + content
            file.write(struct.pack("<II", RECORDIO_MAGIC, len(data)) + data + b"\0" * (-len(data) % 4))


def write_tar(path, records, label="cls"):
    with tarfile.open(path, "w") as tar:
        for number, (content, value) in enumerate(records):
            key = f"class{value}/{number:04d}" if label == "folder" else f"{number:04d}"
            parts = {"jpg": content}
            if label == "cls":
                parts["cls"] = str(value).encode()
            elif label == "json":
                parts["json"] = json.dumps({"label": value, "width": 3}).encode()
            for extension, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


WRITERS = {
    "cls": ("train/{}.tar", write_tar), "json": ("train-{}.tar", lambda p, r: write_tar(p, r, "json")),
    "folder": ("train/{}.tar", lambda p, r: write_tar(p, r, "folder")),
    "tfrecord": ("train-0000{}-of-00002", write_tfrecord), "rec": ("train/{}.rec", write_recordio),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_every_format_gives_the_same_batches_as_the_folder(folder, tmp_path, kind, backend):
    require("torchvision" if backend == "torchvision" else "nvidia.dali")
    records = samples(folder)
    name, write = WRITERS[kind]
    (tmp_path / "train").mkdir()
    for number, half in enumerate((records[:7], records[7:])):
        write(tmp_path / name.format(number), half)
    options = {"batch_size": 4, "seed": 1, "image_size": 32, "backend": backend}
    loader = create_loader(tmp_path, **options)
    assert "2 shards" in loader.description and loader.samples == 18 and loader.num_classes == 3
    assert same(collect(loader), collect(create_loader(folder, **options)))
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), collect(iterator)
    again = create_loader(tmp_path, **options)
    again.load_state_dict(state)
    assert same(collect(again), rest)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("cls", r"0.tar is truncated: \S+ ends at byte \d+, the file at"), ("tfrecord", "is truncated: record 5 ends at"),
     ("rec", r"0.rec is truncated: record \d ends at byte")],
)  # fmt: skip
def test_a_truncated_shard_is_named(folder, tmp_path, kind, message):
    name, write = WRITERS[kind]
    (tmp_path / "train").mkdir()
    path = tmp_path / name.format(0)
    write(path, samples(folder)[:6])
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: -1500 if kind == "cls" else -5])
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, "train")


def test_damaged_shards_are_named(folder, tmp_path):
    records = samples(folder)[:6]
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "0.tar"
    write_tar(path, records)
    whole = path.read_bytes()
    stripped = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: -(-stripped // 512) * 512])  # just after the last member, where tarfile sees no error
    with pytest.raises(DataError, match=r"0\.tar is truncated: it has no end mark after 6 images"):
        open_source(tmp_path, "train")
    path.write_bytes(whole[: stripped + 100])
    with pytest.raises(DataError, match=r"0\.tar is damaged: unexpected end of data"):
        open_source(tmp_path, "train")
    path.write_bytes(b"no tar file" * 100)
    with pytest.raises(DataError, match=r"0\.tar is damaged"):
        open_source(tmp_path, "train")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.tar"):
        open_source(tmp_path, "train")
    write_tar(path, records, label="nothing")
    with pytest.raises(DataError, match=r"has no label for 0000\.jpg: neither \.cls nor \.json nor a class folder"):
        open_source(tmp_path, "train")
    write_tar(path, [(content, 4) for content, _ in records], "folder")
    with pytest.raises(DataError, match=r"has 1 classes \(class4\); a classifier needs at least two"):
        open_source(tmp_path, "train")
    path.unlink()
    record = tmp_path / "train" / "0.tfrecord"
    write_tfrecord(record, records, key=b"image/other")
    with pytest.raises(DataError, match=r"record 0 lacks the feature image/encoded"):
        open_source(tmp_path, "train")
    record.write_bytes(struct.pack("<QI", 40, 0) + b"\xff" * 40 + b"\0" * 4)
    with pytest.raises(DataError, match=r"record 0 is no tf\.train\.Example"):
        open_source(tmp_path, "train")
    record.unlink()
    (tmp_path / "train" / "0.rec").write_bytes(b"x" * 64)
    with pytest.raises(DataError, match=r"0\.rec is damaged: no record begins at byte 0"):
        open_source(tmp_path, "train")


def test_classes_of_shards(folder, tmp_path):
    records = samples(folder)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    write_tar(tmp_path / "train" / "0.tar", records, "folder")
    write_tar(tmp_path / "val" / "0.tar", records[12:], "folder")
    found = open_source(tmp_path, "test")
    assert found.classes == ["class0", "class1", "class2"] and set(found.labels) == {2}, "those of training"
    write_tar(tmp_path / "val" / "0.tar", [(records[0][0], 7)], "folder")
    with pytest.raises(DataError, match=r"0000\.jpg has the label 'class7', which is none of the 3 classes \(class0"):
        open_source(tmp_path, "test")
    (tmp_path / "classes.txt").write_text("class7\nclass0\nclass1\nclass2\n")
    assert open_source(tmp_path, "test").labels == [0]
    (tmp_path / "classes.txt").write_text("a\na\n")
    with pytest.raises(DataError, match="names a class twice"):
        open_source(tmp_path, "test")


def test_packing_keeps_images_and_classes(folder, tmp_path):
    require("torchvision")
    for split in ("train", "test"):
        done = pack(folder, tmp_path, split, shard_bytes=4000, seed=3)
        assert done.images == 18 and len(done.shards) > 2 and all(path.exists() for path in done.shards)
        assert sorted(samples(tmp_path, split)) == sorted(samples(folder, split))
    assert samples(tmp_path) != samples(folder), "shuffled"
    assert open_source(tmp_path, "train").classes == ["ant", "bee", "cat"]
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(DataError, match="train is not empty"):
        pack(folder, tmp_path, "train")
    with pytest.raises(UserError, match="quality 1 to 100"):
        pack(folder, tmp_path / "other", "train", quality=0)


def test_packing_smaller_images(folder, tmp_path):
    Image = require("PIL.Image")
    done = pack(folder, tmp_path, "train", short_side=64)
    for content, _ in samples(tmp_path):
        with Image.open(io.BytesIO(content)) as image:
            assert min(image.size) == 64
    assert done.size == sum(len(content) for content, _ in samples(tmp_path))
    pack(folder, tmp_path / "same", "train", short_side=1000)
    assert sorted(samples(tmp_path / "same")) == sorted(samples(folder)), "nothing is enlarged or encoded again"


def test_packing_stops_at_a_bad_image_and_leaves_no_half_shard(folder, tmp_path):
    root = make_folder(tmp_path / "images")
    (root / "train" / "bee" / "1.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"bee/1\.jpg can't be packed: the file is empty; fastres data check lists"):
        pack(root, tmp_path / "out", "train", shard_bytes=10**9)
    assert not list((tmp_path / "out" / "train").iterdir())


# --- CIFAR


def write_cifar(root, name, kind, count):
    generator = np.random.default_rng(0)
    classes = 10 if name == "cifar10" else 100
    names = [f"class {i}" for i in range(classes)]
    files = {"train": ([f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"])}
    files["test"] = ["test_batch"] if classes == 10 else ["test"]
    root.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, parts in files.items():
        for part in parts:
            number = count[split] // len(parts)
            pixels = generator.integers(0, 256, (number, 3072), dtype=np.uint8)
            labels = generator.integers(0, classes, number)
            made.setdefault(split, []).append((pixels, labels))
            if kind == "python":
                key = "labels" if classes == 10 else "fine_labels"
                content = {b"data": pixels, key.encode(): labels.tolist(), b"batch_label": b"x"}
                (root / part).write_bytes(pickle.dumps(content, protocol=2))
            else:
                head = [labels[:, None]] if classes == 10 else [labels[:, None] // 5, labels[:, None]]
                rows = np.concatenate([*head, pixels], 1).astype(np.uint8)
                (root / f"{part}.bin").write_bytes(rows.tobytes())
    if kind == "python":
        key = b"label_names" if classes == 10 else b"fine_label_names"
        meta = pickle.dumps({key: [n.encode() for n in names]}, protocol=2)
        (root / ("batches.meta" if classes == 10 else "meta")).write_bytes(meta)
    else:
        listing = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
        (root / listing).write_text("\n".join(names) + "\n\n")
    return {split: tuple(map(np.concatenate, zip(*parts, strict=True))) for split, parts in made.items()}


@pytest.fixture
def small_cifar(monkeypatch):
    from fastres.data import cifar

    counts = {"train": 50, "test": 20}
    monkeypatch.setattr(cifar, "SIZES", counts)
    return counts


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar_is_read_in_both_formats(tmp_path, small_cifar, name, kind):
    from fastres.data.cifar import FOLDERS, load_cifar

    inside = FOLDERS[name][kind == "binary"]
    made = write_cifar(tmp_path / inside, name, kind, small_cifar)
    for place in (tmp_path, tmp_path / inside):
        arrays = load_cifar(name, place)
        for split, images, labels in (("train", arrays.train_images, arrays.train_labels),
                                      ("test", arrays.test_images, arrays.test_labels)):  # fmt: skip
            pixels, expected = made[split]
            assert labels.tolist() == expected.tolist() and images.dtype == torch.uint8
            assert np.array_equal(images.numpy(), pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    loader = create_loader(name, data_dir=tmp_path, batch_size=16)
    assert loader.input_shape == (3, 32, 32) and loader.num_classes == (10 if name == "cifar10" else 100)
    assert loader.classes[3] == "class 3" and sum(len(y) for _, y in loader) == 50


def test_cifar_that_is_missing_or_damaged(tmp_path, small_cifar):
    with pytest.raises(DataError, match=r"cifar10 is not downloaded: give the folder that holds cifar-10-batches-py"):
        create_loader("cifar10")
    with pytest.raises(DataError, match=r"cifar100 was not found: .* does not exist"):
        create_loader("cifar100", data_dir=tmp_path / "gone")
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar(folder, "cifar10", "binary", small_cifar)
    with pytest.raises(UserError, match="32x32 images; got image_size 64"):
        create_loader("cifar10", data_dir=tmp_path, image_size=64)
    part = folder / "data_batch_2.bin"
    content = part.read_bytes()
    part.write_bytes(content[:-7])
    with pytest.raises(DataError, match=r"data_batch_2\.bin is incomplete: \d+ bytes are no multiple of 3073"):
        create_loader("cifar10", data_dir=tmp_path)
    part.write_bytes(content[3073:])
    with pytest.raises(DataError, match=r"has 49 images .*, expected 50"):
        create_loader("cifar10", data_dir=tmp_path)
    part.write_bytes(b"\x63" + content[1:])
    with pytest.raises(DataError, match="labels from 0 to 99, expected 0 to 9"):
        create_loader("cifar10", data_dir=tmp_path)
    part.unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_2\.bin"):
        create_loader("cifar10", data_dir=tmp_path)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path, small_cifar, capsys):
    folder = tmp_path / "cifar-100-python"
    write_cifar(folder, "cifar100", "python", small_cifar)
    (folder / "train").write_bytes(pickle.dumps({b"data": Harmful()}))
    with pytest.raises(DataError, match=r"train can't be read: it asks for builtins\.print"):
        create_loader("cifar100", data_dir=tmp_path)
    assert not capsys.readouterr().out
