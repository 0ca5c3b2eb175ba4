"""Who gets which sample when: shares of processes, random numbers by sample, sizes from headers, crops."""

import io

import numpy as np
import pytest
import torch
from conftest import require

from fastres.data import create_loader
from fastres.data.geometry import Crops, image_shape, place
from fastres.data.sampling import Plan, uniforms
from fastres.errors import DataError, UserError


@pytest.mark.parametrize("samples", [1, 5, 16, 17, 31, 32, 33, 63, 64, 65, 67, 131])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_an_epoch_without_gaps_or_repeats(samples, world):
    if samples < world:
        with pytest.raises(DataError, match=f"{samples} samples can't be shared by {world} processes"):
            Plan(samples, 16, 0, world)
        return
    plans = [Plan(samples, 16, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1, "a process with fewer steps would leave the others waiting"
    order = np.arange(samples)
    parts = [[order[plan[step]] for plan in plans] for step in range(len(plans[0]))]
    joint = np.concatenate([part for step in parts for part in step])
    assert joint.tolist() == order.tolist(), "in the order of one process, each sample once"
    assert all(1 <= len(part) <= 16 for step in parts for part in step)
    dropping = [Plan(samples, 16, rank, world, drop_last=True) for rank in range(world)]
    assert {len(plan) for plan in dropping} == {samples // (16 * world)}


def test_joint_batches_are_those_of_one_process():
    alone = Plan(100, 24)
    plans = [Plan(100, 8, rank, 3) for rank in range(3)]
    for step in range(4):
        begin, end = plans[0][step].start, plans[2][step].stop
        assert (begin, end) == (alone[step].start, alone[step].stop)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(rank, world):
    with pytest.raises(UserError, match="rank must be in 0 to world_size - 1"):
        create_loader("digits", rank=rank, world_size=world)


def test_named_sets_are_shared_too():
    alone = create_loader("digits", batch_size=96, seed=3)
    parts = [create_loader("digits", batch_size=48, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for (images, labels), first, second in zip(alone, *parts, strict=True):
        assert torch.equal(images, torch.cat([first[0], second[0]]))
        assert torch.equal(labels, torch.cat([first[1], second[1]]))


def test_random_numbers_belong_to_samples():
    samples = np.arange(5000)
    draws = uniforms(7, 2, samples, 8, "crop")
    chosen = np.array([4000, 3, 77])
    assert np.array_equal(uniforms(7, 2, chosen, 8, "crop"), draws[chosen])
    assert draws.min() >= 0 and draws.max() < 1
    for other in (uniforms(8, 2, samples, 8, "crop"), uniforms(7, 3, samples, 8, "crop"),
                  uniforms(7, 2, samples, 8, "colour"), np.roll(draws, 1, 0), np.roll(draws, 1, 1)):  # fmt: skip
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.02
    counts = np.histogram(draws, 20, (0, 1))[0]
    expected = draws.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45, "chi-square of 19 degrees: exceeded once in a thousand"


def encoded(kind, width, height, **options):
    Image = require("PIL.Image")
    content = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), (width, height), 77).save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"mode": "CMYK"}), ("JPEG", {"mode": "L"}),
        ("JPEG", {"comment": b"x" * 3000}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
        ("WEBP", {"mode": "RGBA"}), ("GIF", {}), ("BMP", {}),
    ],
)  # fmt: skip
def test_headers_tell_the_size(kind, options):
    content = encoded(kind, 331, 207, **options)
    assert image_shape(content) == image_shape(np.frombuffer(content, np.uint8)) == (207, 331)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"<html>" * 20, encoded("JPEG", 9, 9)[:30], b"\xff\xd8\xff\x00" * 9]
)
def test_no_size_without_a_header(content):
    assert image_shape(content) is None


def test_centres_are_where_torchvision_has_them():
    TF = require("torchvision.transforms.v2.functional")
    sizes = np.array([[375, 500], [500, 375], [256, 341], [333, 500], [700, 256], [100, 100]])
    geometry = place(Crops("center"), sizes, np.arange(6), 224, 0, 0)
    for (height, width), resized, offset in zip(sizes, geometry.resized, geometry.offsets, strict=True):
        ramp = torch.arange(height * width).reshape(1, height, width)
        theirs = TF.resize(ramp.to(torch.uint8), [256], antialias=True)
        assert theirs.shape[1:] == tuple(resized)
        numbers = torch.arange(int(resized.prod())).reshape(1, *resized)
        assert TF.center_crop(numbers, [224, 224])[0, 0, 0] == offset[0] * resized[1] + offset[1]


def test_scale_augmentation_takes_squares_of_the_papers_sizes():
    sizes = np.tile([375, 500], (4000, 1))
    geometry = place(Crops("scale"), sizes, np.arange(4000), 224, 5, 1)
    top, left, height, width = geometry.windows.T
    assert np.array_equal(height, width) and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 375).all() and (left + width <= 500).all()
    short = 375 * 224 / height
    assert 255 < short.min() < 258 and 475 < short.max() < 483 and abs(short.mean() - 368) < 4
    assert 0.47 < geometry.mirrors.mean() < 0.53
    assert not place(Crops("scale", mirror=False), sizes, np.arange(4000), 224, 5, 1).mirrors.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "round"}, "resized, scale or center, got 'round'"), ({"area": (0.5, 0.1)}, "lower bound first"),
        ({"fraction": 0}, "fraction is of the short side"), ({"interpolation": "nearest"}, "got 'nearest'"),
    ],
)  # fmt: skip
def test_wrong_crops_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Crops(**options)
