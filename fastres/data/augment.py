"""Augmentation of decoded batches, on their device. Each sample's random numbers depend on seed, epoch and sample only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastres.data.sampling import epoch_generator, uniforms
from fastres.errors import UserError

# Of ImageNet's pixels in [0, 1], RGB: Krizhevsky et al. 2012, section 4.1; the values are fb.resnet.torch's.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
LUMA = (0.299, 0.587, 0.114)
STD = (0.229, 0.224, 0.225)
ORDERS = tuple(itertools.permutations(range(3)))
STREAM = 64  # random numbers of a sample; those for geometry come from another stream


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch besides cropping and mirroring; nothing by default.

    Attributes:
        jitter: brightness, contrast and saturation, in random order, each by a factor in 1 ± jitter (0.4 in
            fb.resnet.torch).
        pca: standard deviation of AlexNet's colour noise along the principal components (0.1 there).
        auto: torchvision's RandAugment or TrivialAugmentWide, image by image.
        erase: probability that a rectangle becomes zero after normalisation (Random Erasing, Zhong et al. 2017;
            0.25 is usual).
    """

    jitter: float = 0.0
    pca: float = 0.0
    auto: Literal["none", "randaugment", "trivialaugment"] = "none"
    erase: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.jitter <= 1 or self.pca < 0 or not 0 <= self.erase <= 1:
            raise UserError(f"jitter and erase must be in 0 to 1 and pca not negative, got {self}")
        if self.auto not in ("none", "randaugment", "trivialaugment"):
            raise UserError(f"auto must be none, randaugment or trivialaugment, got {self.auto!r}")

    def describe(self) -> str:
        """In words."""
        parts = [f"colour jitter {self.jitter:g}"] if self.jitter else []
        parts += [f"PCA noise {self.pca:g}"] if self.pca else []
        parts += [self.auto] if self.auto != "none" else []
        parts += [f"random erasing {self.erase:g}"] if self.erase else []
        return ", ".join(parts) or "no other augmentation"

    def pixels(self, images: Tensor, samples: np.ndarray, seed: int, epoch: int) -> Tensor:
        """Augment uint8 ``[B, H, W, 3]`` in front of the normalisation."""
        if self.auto != "none":
            images = self._automatic(images, samples, seed, epoch)
        if self.jitter:
            draws = uniforms(seed, epoch, samples, STREAM, "colour")[:, :4]
            values = jitter(images.float(), _on(draws, images), self.jitter)
            images = values.round_().clamp_(0, 255).to(torch.uint8)
        return images

    def values(self, images: Tensor, samples: np.ndarray, seed: int, epoch: int) -> Tensor:
        """Augment normalised ``[B, C, H, W]``: the noise is added here, unrounded; then rectangles are erased."""
        draws = uniforms(seed, epoch, samples, STREAM, "colour") if self.pca or self.erase else np.zeros(0)
        if self.pca:
            noise = _on(pca_noise(draws[:, 4:10], self.pca) / np.array(STD), images)
            images[:, :3] += noise[:, :, None, None].to(images.dtype)
        if self.erase:
            boxes = erased_boxes(draws[:, 10:55], images.shape[2], images.shape[3], self.erase)
            images = erase(images, _on(boxes, images))
        return images

    def _automatic(self, images: Tensor, samples: np.ndarray, seed: int, epoch: int) -> Tensor:
        from torchvision.transforms import v2

        transform = v2.RandAugment() if self.auto == "randaugment" else v2.TrivialAugmentWide()
        devices = [images.device] if images.is_cuda else []
        changed = []
        with torch.random.fork_rng(devices):  # torchvision draws from the global generator
            for image, sample in zip(images.permute(0, 3, 1, 2), samples.tolist(), strict=True):
                torch.manual_seed(epoch_generator(seed, epoch, sample + 1).initial_seed())
                changed.append(transform(image))
        return torch.stack(changed).permute(0, 2, 3, 1).contiguous()


def _on(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, torch.float32)


def jitter(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Brightness, contrast and saturation of float ``[B, H, W, 3]``, by ``draws`` ``[B, 4]`` in [0, 1).

    Each is a mixture with something grey: black, the image's mean luminance, or each pixel's luminance (as in
    fb.resnet.torch and torchvision). The last draw chooses the order.
    """
    factors = 1 + strength * (2 * draws[:, :3] - 1)
    orders = torch.tensor(ORDERS, device=images.device)[(draws[:, 3] * len(ORDERS)).long()]
    for step in range(3):
        kind = orders[:, step]
        factor = factors.gather(1, kind[:, None])[:, :, None, None]
        red, green, blue = images.unbind(3)
        grey = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        # In float64: a sum's rounding depends on how many images there are, and a sample must not.
        mean = grey.mean((1, 2), keepdim=True, dtype=torch.float64).float()
        kind = kind[:, None, None]
        target = torch.where(kind == 0, 0.0, torch.where(kind == 1, mean, grey))
        images = torch.lerp(target[..., None].expand_as(images), images, factor).clamp_(0, 255)
    return images


def pca_noise(draws: np.ndarray, strength: float) -> np.ndarray:
    """What is added to red, green and blue in [0, 1] of each image ``[B, 3]``, from uniform ``draws`` ``[B, 6]``."""
    radius = np.sqrt(-2 * np.log1p(-draws[:, :3]))
    normal = radius * np.cos(2 * np.pi * draws[:, 3:])  # Box and Muller
    scaled = strength * normal * np.array(EIGENVALUES)
    # No matrix product: its rounding depends on how many images there are.
    return sum(scaled[:, i, None] * np.array(EIGENVECTORS)[:, i] for i in range(3))


def erased_boxes(draws: np.ndarray, height: int, width: int, probability: float) -> np.ndarray:
    """Top, left, bottom, right ``[B, 4]`` from ``draws`` ``[B, 45]``; empty where nothing is erased.

    A share of 2 to 33 % of the area and a ratio of 0.3 to 3.3, up to ten attempts, as in the paper and torchvision.
    """
    tries = draws[:, :40].reshape(-1, 10, 4)
    area = height * width * (0.02 + (0.33 - 0.02) * tries[:, :, 0])
    low, high = np.log(0.3), np.log(3.3)
    ratio = np.exp(low + (high - low) * tries[:, :, 1])
    heights, widths = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (heights < height) & (widths < width)
    rows, first = np.arange(len(draws)), fits.argmax(1)
    h, w = heights[rows, first], widths[rows, first]
    top = np.floor(tries[rows, first, 2] * (height - h + 1))
    left = np.floor(tries[rows, first, 3] * (width - w + 1))
    boxes = np.stack([top, left, top + h, left + w], 1)
    boxes[~fits.any(1) | (draws[:, 40] >= probability)] = 0
    return boxes


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set ``boxes`` of ``[B, C, H, W]`` to zero, the mean of normalised pixels."""
    rows = torch.arange(images.shape[2], device=images.device)[None, :]
    columns = torch.arange(images.shape[3], device=images.device)[None, :]
    tall = (rows >= boxes[:, :1]) & (rows < boxes[:, 2:3])
    wide = (columns >= boxes[:, 1:2]) & (columns < boxes[:, 3:])
    return images.masked_fill((tall[:, :, None] & wide[:, None, :])[:, None], 0)


class Mixing:
    """Mixup (Zhang et al. 2017) or CutMix (Yun et al. 2019) of a batch, by torchvision; one of them if both are asked for.

    Calling it with images ``[B, C, H, W]`` and labels ``[B]`` gives images and float targets ``[B, classes]``. It
    draws from torch's global generator, whose state a checkpoint of a run holds.
    """

    def __init__(self, classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        if mixup < 0 or cutmix < 0 or not mixup + cutmix:
            raise UserError(f"mixup and cutmix must be positive, or one of them 0, got {mixup} and {cutmix}")
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise UserError(f"mixup and cutmix are torchvision's: pip install 'fastres[vision]' ({error})") from error
        chosen = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
        chosen += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
        self._transform = v2.RandomChoice(chosen)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mixed, targets = self._transform(images, labels)
        return mixed, targets


def progressive_size(epoch: int, epochs: int, low: int, high: int, begin: float = 0.3, end: float = 0.8) -> int:
    """The image size of an epoch that grows from ``low`` to ``high`` between two shares of the run, in steps of 32.

    For :meth:`fastres.data.folder.ImageLoader.set_image_size` before each epoch.

    Raises:
        UserError: low exceeds high, or the shares are not in order.
    """
    if low > high or not 0 <= begin <= end <= 1 or epochs < 1:
        raise UserError(f"expected low <= high and 0 <= begin <= end <= 1, got {low}, {high}, {begin}, {end}")
    share = epoch / max(1, epochs)
    if share >= end:
        return high
    if share < begin:
        return low
    grown = low + (high - low) * (share - begin) / (end - begin)
    return min(high, max(low, round(grown / 32) * 32))
