"""Training: :func:`train` runs one network on one data set from :class:`Settings`."""

from __future__ import annotations

from fastres.train.loop import train
from fastres.train.settings import RECIPES, Recipe, Settings

__all__ = ["RECIPES", "Recipe", "Settings", "train"]
