"""Recipes: YAML files beside this one, each with its source and the accuracy that the source reports."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastres.errors import RecipeError

FOLDER = Path(__file__).parent

KEYS = {
    "epochs": "passes over the training images",
    "iterations": "steps of the optimiser, instead of epochs; the run ends there, also within an epoch",
    "batch_size": "images of a step, of all processes together",
    "optimizer": "sgd, lars, lamb or adamw; lars and lamb are timm's",
    "lr": "the highest learning rate, for batch_size images",
    "momentum": "of sgd and lars; never with dampening",
    "nesterov": "Nesterov's momentum instead of the plain one",
    "weight_decay": "added to the gradient (sgd, lars); decoupled in adamw",
    "decay_all": "decay biases and BatchNorm's parameters too, instead of weights of convolutions and fc only",
    "schedule": "step, cosine (to zero) or constant; evaluated at each iteration",
    "milestones": "where step multiplies the rate by gamma",
    "milestones_in": "what milestones count: share (of the run), epochs or iterations",
    "gamma": "factor of step",
    "warmup": "epochs at the start with a lower rate",
    "warmup_iterations": "the same in iterations",
    "warmup_factor": "share of lr that warm-up starts from; without it the first of n iterations has lr / n",
    "warmup_constant": "stay at warmup_factor until warm-up ends, instead of rising",
    "label_smoothing": "share of the target that is spread over all classes",
    "mixup": "alpha of mixup (Zhang et al. 2018), 0 for none; with cutmix one of both is drawn for each batch",
    "cutmix": "alpha of CutMix (Yun et al. 2019), 0 for none",
    "ema": "decay of the moving average of weights that is evaluated, 0 for none",
    "ema_every": "iterations between updates of that average",
    "image_size": "side of training images, and of test images where test_image_size is not given",
    "test_image_size": "side of test images; larger than in training as in FixRes (Touvron et al. 2019)",
    "progressive": "[low, high, begin, end]: the side grows between these shares of the run, in steps of 32",
    "normalize": "channel, or pixel: subtract the mean image as the ResNet paper does on CIFAR",
    "augment": "random crops and mirroring of training images",
    "crop": "resized (random area and ratio) or scale (short side from 256 to 480, then a random crop)",
    "color_jitter": "strength of random brightness, contrast and saturation",
    "pca_noise": "standard deviation of AlexNet's colour noise",
    "auto_augment": "none, randaugment or trivialaugment",
    "random_erasing": "probability that a rectangle of an image is erased",
}
DEFAULTS: dict[str, Any] = {
    "optimizer": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay_all": False,
    "schedule": "step", "milestones": [0.5, 0.75], "milestones_in": "share", "gamma": 0.1, "warmup": 0.0,
    "warmup_constant": False, "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "ema": 0.0, "ema_every": 1,
    "normalize": "channel", "crop": "resized", "color_jitter": 0.0, "pca_noise": 0.0, "auto_augment": "none",
    "random_erasing": 0.0,
}  # fmt: skip
ABOUT = ("title", "source", "accuracy", "notes")


@dataclass(frozen=True)
class Recipe:
    """``values`` of :data:`KEYS`, and where they come from. ``accuracy`` is what the source reports, by network."""

    name: str
    title: str
    source: str
    accuracy: Mapping[str, str]
    values: Mapping[str, Any]
    notes: str = ""

    def __getattr__(self, name: str) -> Any:
        """A value by its key."""
        if name in KEYS:
            return self.values[name] if name in self.values else DEFAULTS.get(name)
        raise AttributeError(f"a recipe has no {name!r}")


class Recipes(Mapping[str, Recipe]):
    """The recipes of the package by name, read at first use."""

    def __getitem__(self, name: str) -> Recipe:
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise KeyError(name)
        return read_recipe(path)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in FOLDER.glob("*.yaml")))

    def __len__(self) -> int:
        return len(list(FOLDER.glob("*.yaml")))


RECIPES = Recipes()


def recipe_for(data: str) -> Recipe:
    """The recipe of a named data set, or that of folders."""
    return RECIPES[data if data in ("digits", "fashion-mnist") else "folder"]


def open_recipe(name: str) -> Recipe:
    """A recipe of the package by name, or one of the user's by file.

    Raises:
        RecipeError: there is none of that name, the file can't be read, or it is not valid.
    """
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        return read_recipe(Path(name))
    raise RecipeError(
        f"unknown recipe {name!r}{_close(name, RECIPES)}; there are {', '.join(RECIPES)}, or give a FILE.yaml"
    )


def read_recipe(path: Path) -> Recipe:
    """Read and validate a file.

    Raises:
        RecipeError: it can't be read, has an unknown key, or a value of the wrong kind; the message names all three.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"recipe {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} must hold keys and values, got {type(content).__name__}")
    about = {key: content.pop(key) for key in ABOUT if key in content}
    for key, value in content.items():
        if key not in KEYS:
            raise RecipeError(f"recipe {path} has an unknown key {key!r}{_close(str(key), [*KEYS, *ABOUT])}")
        content[key] = _checked(path, key, value)
    accuracy = about.get("accuracy") or {}
    if not isinstance(accuracy, dict):
        raise RecipeError(f"recipe {path}: accuracy must name networks and what is reported, got {accuracy!r}")
    return Recipe(
        name=path.stem, title=str(about.get("title", path.stem)), source=str(about.get("source", "")),
        accuracy={str(k): str(v) for k, v in accuracy.items()}, values=content, notes=str(about.get("notes", "")),
    )  # fmt: skip


def _checked(path: Path, key: str, value: Any) -> Any:
    from fastres.train.settings import Settings

    kind = get_type_hints(Settings)[key]
    choices = [c for part in get_args(kind) for c in get_args(part) if isinstance(c, str)]
    if choices:
        if value not in choices:
            raise RecipeError(f"recipe {path}: {key} must be one of {', '.join(choices)}, got {value!r}")
        return value
    kinds = [part for part in (get_args(kind) or (kind,)) if part is not type(None)]
    if list[float] in kinds:
        if not isinstance(value, list) or not all(_number(each) for each in value):
            raise RecipeError(f"recipe {path}: {key} must be a list of numbers, got {value!r}")
        return [float(each) for each in value]
    (wanted,) = kinds
    if wanted is bool:
        fits = isinstance(value, bool)
    elif wanted is int:
        fits = _number(value) and value == int(value) and value > 0
    else:
        fits = _number(value) and value >= 0
    if not fits:
        words = {bool: "true or false", int: "a whole number above 0", float: "a number, not negative"}
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) and wanted is float else ""
        raise RecipeError(f"recipe {path}: {key} must be {words[wanted]}, got {value!r}{hint}")
    return wanted(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _close(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 3, 0.5)
    return f"; close to {', '.join(near)}" if near else ""
