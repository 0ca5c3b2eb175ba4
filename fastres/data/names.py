"""Names of classes that folders don't carry."""

from __future__ import annotations

import re

from fastres.errors import UserError

WORDNET = re.compile(r"n\d{8}")


def imagenet_classes() -> list[str]:
    """The 1000 names of ImageNet's classes (ILSVRC 2012) in the order of the outputs, as torchvision's weights carry them.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        from torchvision.models import ResNet50_Weights
    except ImportError as error:
        raise UserError(
            f"ImageNet's class names come with torchvision (pip install 'fastres[vision]'): {error}"
        ) from error
    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def readable(classes: list[str]) -> list[str]:
    """ImageNet's names where ``classes`` are its 1000 WordNet folders (n01440764, …), whose sorted order is that of the
    outputs; anything else comes back as it is. Without torchvision folders keep their names."""
    if len(classes) != 1000 or classes != sorted(classes) or not all(WORDNET.fullmatch(name) for name in classes):
        return classes
    try:
        return imagenet_classes()
    except UserError:
        return classes
