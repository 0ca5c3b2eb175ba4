"""Augmentations of batches against formulas, torchvision, and their own statistics."""

import numpy as np
import pytest
import torch
from conftest import require
from data_cases import collect, make_folder, same

from fastres.data import create_loader
from fastres.data.augment import (
    EIGENVALUES,
    EIGENVECTORS,
    Augmentation,
    Mixing,
    erased_boxes,
    jitter,
    pca_noise,
    progressive_size,
)
from fastres.data.sampling import uniforms
from fastres.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
EVERYTHING = {"color_jitter": 0.4, "pca_noise": 0.1, "auto_augment": "trivialaugment", "random_erasing": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("augment"))


def opened(root, **options):
    require("torchvision")
    return create_loader(root, **{"batch_size": 4, "seed": 2, "image_size": 32, "backend": "torchvision", **options})


@pytest.mark.parametrize("order", range(6))
def test_jitter_is_torchvisions_in_its_order(order):
    TF = require("torchvision.transforms.v2.functional")
    from fastres.data.augment import ORDERS

    images = torch.rand(3, 9, 7, 3, generator=torch.Generator().manual_seed(1)) * 255
    draws = torch.tensor([[0.1, 0.9, 0.3, 0], [0.7, 0.2, 0.8, 0], [0.5, 0.5, 0.5, 0]])
    draws[:, 3] = (order + 0.5) / 6
    found = jitter(images, draws, 0.4)
    change = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for image, draw, mine in zip(images, draws, found, strict=True):
        theirs = image.permute(2, 0, 1) / 255
        for kind in ORDERS[order]:
            theirs = change[kind](theirs, float(1 + 0.4 * (2 * draw[kind] - 1)))
        torch.testing.assert_close(
            mine.permute(2, 0, 1) / 255, theirs, rtol=0, atol=1e-3
        )  # luma weights differ in digit 4
    torch.testing.assert_close(found[2], images[2], msg="factors of 1 change nothing")


def test_colour_noise_has_the_principal_components():
    draws = uniforms(0, 0, np.arange(60000), 6, "colour")
    noise = torch.from_numpy(pca_noise(draws, 0.1)).float()
    vectors, values = torch.tensor(EIGENVECTORS), torch.tensor(EIGENVALUES)
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    torch.testing.assert_close(noise.T.cov(), expected, rtol=0.03, atol=2e-6)
    assert noise.mean(0).abs().max() < 4 * 0.1 * 0.22 * 0.6 / 60000**0.5
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), rtol=0, atol=2e-3)


def test_erased_rectangles_have_torchvisions_shares():
    draws = uniforms(3, 1, np.arange(20000), 45, "colour")
    boxes = erased_boxes(draws, 64, 48, 0.25)
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    erased = heights * widths > 0
    assert abs(erased.mean() - 0.25) < 0.015
    assert (boxes >= 0).all() and (boxes[:, 2] <= 64).all() and (boxes[:, 3] <= 48).all()
    share = (heights * widths)[erased] / (64 * 48)
    assert 0.015 < share.min() < 0.03 and 0.31 < share.max() < 0.35
    transform, blank = require("torchvision.transforms.v2").RandomErasing(p=1), torch.ones(1, 64, 48)
    theirs = np.array([float((transform(blank) == 0).float().mean()) for _ in range(3000)])
    assert abs(share.mean() - theirs.mean()) < 4 * (share.std() + theirs.std()) / 3000**0.5


def test_augmented_samples_do_not_depend_on_batch_or_process(folder):
    whole = collect(opened(folder, batch_size=16, **EVERYTHING))[0]
    cut = collect(opened(folder, batch_size=4, **EVERYTHING))
    assert torch.equal(torch.cat([x for x, _ in cut]), whole[0])
    halves = [collect(opened(folder, batch_size=8, rank=r, world_size=2, **EVERYTHING))[0][0] for r in range(2)]
    assert torch.equal(torch.cat(halves), whole[0])


def test_augmentation_resumes_and_leaves_the_global_generator_alone(folder):
    loader = opened(folder, **EVERYTHING)
    assert "colour jitter 0.4, PCA noise 0.1, trivialaugment, random erasing 0.5" in loader.description
    before = torch.random.get_rng_state()
    iterator = iter(loader)
    next(iterator)
    state, rest = loader.state_dict(), collect(iterator)
    resumed = opened(folder, **EVERYTHING)
    resumed.load_state_dict(state)
    assert same(collect(resumed), rest)
    assert torch.equal(torch.random.get_rng_state(), before)
    loader.set_epoch(1)
    assert not torch.equal(collect(loader)[0][0], collect(opened(folder, **EVERYTHING))[0][0])


@pytest.mark.parametrize("option", EVERYTHING)
def test_each_augmentation_changes_pixels_in_training_only(folder, option):
    plain = torch.cat([x for x, _ in opened(folder)])
    changed = torch.cat([x for x, _ in opened(folder, **{option: EVERYTHING[option]})])
    assert not torch.equal(changed, plain) and changed.shape == plain.shape
    assert same(collect(opened(folder, split="test", **{option: EVERYTHING[option]})),
                collect(opened(folder, split="test")))  # fmt: skip


def test_auto_augment_is_torchvisions():
    v2 = require("torchvision.transforms.v2")
    from fastres.data.sampling import epoch_generator

    images = (torch.rand(3, 16, 16, 3) * 255).byte()
    found = Augmentation(auto="randaugment").pixels(images, np.array([5, 0, 9]), 3, 1)
    torch.manual_seed(epoch_generator(3, 1, 10).initial_seed())
    assert torch.equal(found[2].permute(2, 0, 1), v2.RandAugment()(images[2].permute(2, 0, 1)))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0), (0, 1.0), (0.2, 1.0)])
def test_mixing_gives_targets_that_match_the_images(mixup, cutmix):
    require("torchvision")
    torch.manual_seed(0)
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    images, labels = values[:, None, None, None].expand(4, 3, 32, 32).clone(), torch.arange(4)
    mixed, targets = Mixing(4, mixup, cutmix)(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ values, rtol=0, atol=1e-4)


def test_mixing_nothing_is_refused():
    for mixup, cutmix in ((0, 0), (-1, 2)):
        with pytest.raises(UserError, match="mixup and cutmix must be positive"):
            Mixing(4, mixup, cutmix)


def test_sizes_grow_from_low_to_high():
    sizes = [progressive_size(epoch, 16, 128, 224) for epoch in range(16)]
    assert sizes == sorted(sizes) and sizes[0] == 128 and sizes[-1] == 224 and {s % 32 for s in sizes} == {0}
    assert sizes[4] == 128 and sizes[13] == 224 and 160 in sizes and 192 in sizes
    with pytest.raises(UserError, match="low <= high"):
        progressive_size(0, 16, 224, 128)
