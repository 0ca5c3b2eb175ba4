"""fastres data: checking, packing, timing; and memory over epochs."""

import gc
import os
from pathlib import Path

import pytest
from conftest import require
from data_cases import make_folder, write_picture

from fastres.cli import main
from fastres.data import create_loader
from fastres.data.measuring import read_run, verdict
from fastres.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")


@pytest.fixture
def folder(tmp_path):
    require("torchvision")
    return make_folder(tmp_path / "images", count=6)


def damage(folder):
    """One file of each kind of damage; returns the paths."""
    place = folder / "train" / "bee"
    content = (place / "0.jpg").read_bytes()
    middle = len(content) // 2
    kinds = {
        "half.jpg": content[:middle], "end.jpg": content[:-2], "empty.jpg": b"", "page.jpg": b"<html>not found</html>",
        "head.jpg": content[:100],
    }  # fmt: skip
    for name, broken in kinds.items():
        (place / name).write_bytes(broken)
    (place / "lost.jpg").symlink_to(place / "nowhere.jpg")
    return [str(place / name) for name in (*kinds, "lost.jpg")]


def test_check_finds_every_bad_file_and_its_list_makes_a_run_possible(folder, tmp_path, capsys):
    Image = require("PIL.Image")
    Image.new("RGB", (40, 30)).save(folder / "val" / "ant" / "png.jpg", "PNG")
    Image.new("CMYK", (40, 30)).save(folder / "val" / "ant" / "cmyk.jpg", "JPEG")
    listing = tmp_path / "lists" / "bad.txt"
    command = ["data", "check", str(folder), "--bad-list", str(listing)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "1 are of another format than their name says" in out and "png.jpg" in out and "1 JPEG CMYK" in out
    assert "0 of 26 images are bad" in out and listing.read_text().startswith("# 0 of 26")
    bad = damage(folder)
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "6 of 32 images are bad" in out and all(f"bad: {path}: " in out for path in bad)
    listed = [line.split("\t") for line in listing.read_text().splitlines()[1:]]
    assert sorted(name for name, _ in listed) == sorted(bad) and all(reason for _, reason in listed)
    with pytest.raises(DataError, match="can't be decoded"):
        list(create_loader(folder, batch_size=5, image_size=32))
    loader = create_loader(folder, batch_size=5, image_size=32, exclude=listing)
    assert sum(len(labels) for _, labels in loader) == 12


def test_check_of_one_split_and_of_shards(folder, tmp_path, capsys):
    damage(folder)
    listing = str(tmp_path / "bad.txt")
    assert main(["data", "check", str(folder), "--split", "test", "--bad-list", listing]) == 0
    assert "0 of 12" in capsys.readouterr().out
    assert main(["data", "shard", str(folder), str(tmp_path / "out"), "--split", "test"]) == 0
    assert "12 images in 1 shards" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "out"), "--bad-list", listing]) == 0
    assert "12 images: 12 JPEG" in capsys.readouterr().out


def test_wrong_use_is_explained(folder, tmp_path, capsys):
    for arguments, message in (
        (["check", str(tmp_path / "gone")], "gone does not exist; expected ROOT/train"),
        (["shard", str(folder)], "give the folder to write"),
        (["bench", str(folder), "--run", str(tmp_path)], "log.csv is no log of fastres train"),
    ):
        assert main(["data", *arguments]) == 2
        assert message in capsys.readouterr().err
    damage(folder)
    assert main(["data", "shard", str(folder), str(tmp_path / "out")]) == 2
    assert "fastres data check lists all such files" in capsys.readouterr().err


def test_bench_times_stages_and_judges_a_run(folder, tmp_path, capsys):
    log = tmp_path / "log.csv"
    log.write_text("epoch,images_per_s,data_wait_share\n1,10,0.9\n2,400,0.30\n3,420,0.20\n")
    arguments = ["data", "bench", str(folder), "--batches", "3", "--batch-size", "4", "--image-size", "32"]
    assert main([*arguments, "--run", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for stage in ("read", "decode whole images", "resize whole images", "to float32, 3 channels", "whole pipeline"):
        assert stage in out
    assert "bound by data: the run waited 25% of its time for batches" in out
    assert read_run(tmp_path).images_per_s == 410, "the first epoch doesn't count"
    assert verdict(900, 1000).startswith("bound by data: 1,000 images/s are needed, 900 delivered")
    assert verdict(3000, 1000) == "not bound by data: 3,000 images/s are delivered, 3.0 times what is needed"
    log.write_text("epoch,images_per_s,data_wait_share\n")
    with pytest.raises(DataError, match="has no finished epoch yet"):
        read_run(tmp_path)


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_memory_does_not_grow_with_epochs(tmp_path, backend):
    if backend == "dali":
        require("nvidia.dali")
    for index in range(80):
        write_picture(tmp_path / "train" / f"class{index % 2}" / f"{index}.jpg", index, 200, 260)
    loader = create_loader(tmp_path, batch_size=16, image_size=96, output="uint8", backend=backend)
    sizes = []
    for epoch in range(16):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
        sizes.append(resident())
    early = max(sizes[2:6])
    assert sizes[-1] <= early * 1.03, [size >> 20 for size in sizes]
