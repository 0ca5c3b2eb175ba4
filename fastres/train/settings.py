"""What a training run is told. Nothing here imports torch: the command line's help reads these defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Recipe:
    """Defaults that suit one kind of data."""

    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["step", "cosine", "constant"]
    warmup: float  # epochs
    weight_decay: float = 1e-4
    milestones: tuple[float, ...] = (0.5, 0.75)


RECIPES = {
    "digits": Recipe(epochs=10, batch_size=64, lr=0.1, schedule="cosine", warmup=1.0, weight_decay=5e-4),
    "fashion-mnist": Recipe(epochs=4, batch_size=128, lr=0.2, schedule="cosine", warmup=0.5, weight_decay=5e-4),
    # A folder of images: the ResNet paper on ImageNet, with the steps that were used in practice.
    "folder": Recipe(epochs=90, batch_size=256, lr=0.1, schedule="step", warmup=0.0, milestones=(1 / 3, 2 / 3)),
}


def recipe_for(data: str) -> Recipe:
    """The recipe of a named data set, or that of folders."""
    return RECIPES.get(data, RECIPES["folder"])


@dataclass
class Settings:
    """One training run. What is ``None`` comes from the recipe of the data, or from the data themselves."""

    model: str
    data: str = "digits"
    out: str | None = None  # runs/<model>-<data>
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    decay_all: bool = False  # decay biases and BatchNorm's parameters too, as fb.resnet.torch does
    schedule: Literal["step", "cosine", "constant"] | None = None
    milestones: list[float] | None = None  # fractions of the run after which "step" divides the rate by 10
    warmup: float | None = None  # epochs
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    fused: bool = True
    memory: Literal["default", "recompute"] = "default"
    num_classes: int | None = None
    resume: str = "auto"  # "auto", "never" or a checkpoint
    overwrite: bool = False
    deterministic: bool = False
    workers: int = 2
    threads: int | None = None
    device: str = "auto"
    data_dir: str | None = None
    image_size: int | None = None
    augment: bool = True
    normalize: Literal["channel", "pixel"] = "channel"
    on_bad_image: Literal["stop", "skip"] = "stop"
    limit: int | None = None
    wandb: str | None = None  # a project of Weights & Biases

    def resolved(self) -> Settings:
        """A copy in which the recipe's values have replaced each ``None`` that a recipe knows."""
        recipe = recipe_for(self.data)
        values: dict[str, Any] = {
            field.name: getattr(recipe, field.name)
            for field in dataclasses.fields(recipe)
            if getattr(self, field.name) is None
        }
        if "milestones" in values:
            values["milestones"] = list(values["milestones"])
        if self.out is None:
            values["out"] = f"runs/{self.model}-{self.data.rstrip('/').rsplit('/', 1)[-1]}"
        return dataclasses.replace(self, **values)
