"""Training: :func:`train` runs one network on one data set from :class:`Settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastres.train.settings import RECIPES, Recipe, Settings

if TYPE_CHECKING:
    from fastres.train.loop import train

__all__ = ["RECIPES", "Recipe", "Settings", "train"]


def __getattr__(name: str) -> Any:
    """Load the loop on first use: the command line's help needs the settings only."""
    if name == "train":
        from fastres.train.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
