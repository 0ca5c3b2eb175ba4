"""What a training run is told. Nothing here imports torch: the command line's help reads these defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from fastres.errors import UserError
from fastres.train.recipes import DEFAULTS, RECIPES, Recipe, open_recipe, recipe_for

__all__ = ["RECIPES", "Recipe", "Settings", "recipe_for"]


@dataclass
class Settings:
    """One training run. What is ``None`` comes from the recipe, from :data:`fastres.train.recipes.DEFAULTS`, or from the
    data themselves. :data:`fastres.train.recipes.KEYS` says what each key of a recipe means."""

    model: str
    data: str = "digits"
    recipe: str | None = None  # a name of fastres/train/recipes, or a YAML file; otherwise by the data
    out: str | None = None  # runs/<model>-<data>
    epochs: int | None = None
    iterations: int | None = None  # ends the run there, also within an epoch
    batch_size: int | None = None  # of all processes together
    optimizer: Literal["sgd", "lars", "lamb", "adamw"] | None = None
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    decay_all: bool | None = None  # decay biases and BatchNorm's parameters too, as fb.resnet.torch does
    schedule: Literal["step", "cosine", "constant"] | None = None
    milestones: list[float] | None = None
    milestones_in: Literal["share", "epochs", "iterations"] | None = None
    gamma: float | None = None
    warmup: float | None = None  # epochs
    warmup_iterations: int | None = None
    warmup_factor: float | None = None
    warmup_constant: bool | None = None
    label_smoothing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    ema: float | None = None
    ema_every: int | None = None
    progressive: list[float] | None = None
    test_image_size: int | None = None
    color_jitter: float | None = None
    pca_noise: float | None = None
    auto_augment: Literal["none", "randaugment", "trivialaugment"] | None = None
    random_erasing: float | None = None
    crop: Literal["resized", "scale"] | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
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
    normalize: Literal["channel", "pixel"] | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"
    limit: int | None = None
    accumulate: int = 1  # parts of a batch that are computed one after another
    save_every: int = 0  # iterations; 0 saves after each epoch only
    keep: int = 1  # newest checkpoints kept; more than 1 keeps numbered ones beside checkpoint-last.pt
    async_save: bool = True  # write checkpoints in a thread
    compile: bool = False
    cuda_graphs: bool = False
    channels_last: bool = True
    sync_bn: bool = False
    zero: bool = False
    compress: bool = False
    reshard: bool = False  # continue with another number of processes than the checkpoint's
    wandb: str | None = None  # a project of Weights & Biases

    def resolved(self) -> Settings:
        """A copy in which the recipe's values, then the general ones, have replaced each ``None`` that they know.

        Raises:
            RecipeError: there is no such recipe, or it is not valid. UserError: values that exclude each other.
        """
        recipe = open_recipe(self.recipe) if self.recipe else recipe_for(self.data)
        known = {**DEFAULTS, **recipe.values}
        if self.epochs is not None or self.iterations is not None:
            # The length that is given replaces the recipe's, whatever it is counted in.
            whole = {name: known.pop(name, None) for name in ("epochs", "iterations")}
            counted = whole.get(known["milestones_in"])
            if counted:
                # Another length keeps the shape of the schedule.
                known |= {"milestones": [each / counted for each in known["milestones"]], "milestones_in": "share"}
        for given, other in (("warmup", "warmup_iterations"), ("warmup_iterations", "warmup")):
            if getattr(self, given) is not None:
                known.pop(other, None)
        if self.milestones is not None and self.milestones_in is None:
            known["milestones_in"] = "share"
        values: dict[str, Any] = {
            name: list(value) if isinstance(value, (list, tuple)) else value
            for name, value in known.items()
            if getattr(self, name) is None
        }
        if self.out is None:
            values["out"] = f"runs/{self.model}-{self.data.rstrip('/').rsplit('/', 1)[-1]}"
        made = dataclasses.replace(self, **values)
        made.check()
        return made

    def check(self) -> None:
        """Refuse values that exclude each other or make no sense.

        Raises:
            UserError: says which, and what was expected.
        """
        if self.epochs is not None and self.iterations is not None:
            raise UserError(f"epochs ({self.epochs}) and iterations ({self.iterations}) are both given; give one")
        for name in ("accumulate", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.progressive is not None and len(self.progressive) != 4:
            raise UserError(f"progressive must be [low, high, begin, end], got {self.progressive}")
        if self.compile and self.cuda_graphs:
            raise UserError("compile and cuda_graphs exclude each other: torch.compile captures graphs of its own")
        if self.zero and self.optimizer == "lars":
            raise UserError("zero is for sgd, lamb and adamw; timm's lars was not tried with it")

    def image_size_at(self, epoch: int, epochs: int) -> int | None:
        """The side of training images in an epoch, counted from 0: ``progressive`` grows from low to high, in multiples
        of 32, between the shares begin and end of the run."""
        if self.progressive is None:
            return self.image_size
        from fastres.data.augment import progressive_size

        low, high, begin, end = self.progressive
        return progressive_size(epoch, epochs, int(low), int(high), begin, end)
