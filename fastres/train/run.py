"""A run's parts and where it stands: built from settings, saved to and restored from checkpoints."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastres
from fastres.data import Loader, create_loader
from fastres.errors import CheckpointError, UserError
from fastres.train.checkpoint import (
    check_config,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from fastres.train.optim import Schedule, make_optimizer
from fastres.train.records import Row
from fastres.train.settings import Settings

LAST, BEST = "checkpoint-last.pt", "checkpoint-best.pt"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but torch finds no GPU")
    return device


def prepare_torch(settings: Settings) -> None:
    """Seed, threads and determinism; must come before the first network is built."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.backends.cudnn.benchmark = not settings.deterministic
    torch.manual_seed(settings.seed)


def build_model(settings: Settings, train_data: Loader) -> nn.Module:
    """The network that suits the data.

    Raises:
        UserError: fewer outputs than classes, or an option that the network doesn't have.
    """
    classes = settings.num_classes or train_data.num_classes
    if classes < train_data.num_classes:
        raise UserError(f"num_classes {classes} is less than the {train_data.num_classes} classes of {settings.data}")
    options: dict[str, Any] = {"num_classes": classes}
    if train_data.input_shape[0] != 3:
        options["in_channels"] = train_data.input_shape[0]
    if settings.memory != "default":
        options["memory"] = settings.memory
    return fastres.create_model(settings.model, fused=settings.fused, **options)


class Run:
    """Everything that a checkpoint holds. ``epoch`` counts finished epochs, ``batch`` those of the unfinished one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings = settings.resolved()
        self.out = Path(settings.out or ".")
        self.device = pick_device(settings.device)
        prepare_torch(settings)
        common: dict[str, Any] = {
            "batch_size": settings.batch_size, "seed": settings.seed, "workers": settings.workers,
            "image_size": settings.image_size, "normalize": settings.normalize, "device": self.device,
            "on_bad_image": settings.on_bad_image, "data_dir": settings.data_dir, "limit": settings.limit,
        }  # fmt: skip
        # A batch of one can't be normalised, and an incomplete one disturbs the statistics: training drops it.
        self.train_data = create_loader(settings.data, "train", augment=settings.augment, drop_last=True, **common)
        self.test_data = create_loader(settings.data, "test", **common)
        if not len(self.train_data):
            raise UserError(
                f"batch size {settings.batch_size} is more than the {self.train_data.samples} training images"
            )
        model = build_model(settings, self.train_data)
        self.config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        assert settings.lr is not None and settings.epochs is not None and settings.weight_decay is not None
        assert settings.schedule is not None and settings.warmup is not None and settings.milestones is not None
        self.epochs, self.dtype = settings.epochs, DTYPES[settings.dtype]
        self.optimizer = make_optimizer(
            self.model, settings.lr, settings.momentum, settings.weight_decay, settings.decay_all
        )
        per_epoch = len(self.train_data)
        self.schedule = Schedule(
            settings.schedule, settings.lr, per_epoch * settings.epochs, round(per_epoch * settings.warmup),
            tuple(settings.milestones),
        )  # fmt: skip
        self.epoch = self.batch = self.iteration = 0
        self.best = -1.0
        self.rows: list[Row] = []
        # Of the unfinished epoch: loss sum, correct, images on the device; seconds and seconds of waiting for data.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.seconds = self.waited = 0.0

    def save(self, *names: str) -> None:
        """Write a checkpoint to each name in the run's folder."""
        state = {
            "config": self.config, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": asdict(self.schedule), "settings": asdict(self.settings),
            "loader": self.train_data.state_dict(),
            "epoch": self.epoch, "batch": self.batch, "iteration": self.iteration, "best": self.best,
            "rows": [asdict(row) for row in self.rows], "sums": self.sums.cpu(), "seconds": self.seconds,
            "waited": self.waited, "random": random_state(),
            "classes": list(self.train_data.classes), "input_shape": list(self.train_data.input_shape),
        }  # fmt: skip
        save_checkpoint(state, *(self.out / name for name in names))

    def restore(self, path: Path) -> list[str]:
        """Continue from a checkpoint; returns what differs in the settings, in words.

        Raises:
            CheckpointError: it can't be read or is of another network. DataError: it is of other data.
        """
        state = load_checkpoint(path)
        check_config(state["config"], self.config, path)
        try:
            self.model.load_state_dict(state["model"])
            self.train_data.load_state_dict(state["loader"])
            self.optimizer.load_state_dict(state["optimizer"])
            set_random_state(state["random"])
            self.epoch, self.batch, self.iteration = state["epoch"], state["batch"], state["iteration"]
            self.best, self.rows = state["best"], [Row(**row) for row in state["rows"]]
            self.sums = state["sums"].to(self.device)
            self.seconds, self.waited = state["seconds"], state["waited"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise CheckpointError(f"checkpoint {path} doesn't fit this run: {error}") from error
        for group, fresh in zip(self.optimizer.param_groups, self._group_options(), strict=True):
            group.update(fresh)
        saved, now = state["settings"], asdict(self.settings)
        free = {"out", "resume", "overwrite", "workers", "threads", "device"}
        return [f"{k} {saved.get(k)} -> {v}" for k, v in now.items() if k not in free and saved.get(k) != v]

    def _group_options(self) -> list[dict[str, float]]:
        """Options that the command line sets anew when a run is continued."""
        decay = [self.settings.weight_decay or 0.0, 0.0]
        return [
            {"momentum": self.settings.momentum, "weight_decay": decay[index]}
            for index in range(len(self.optimizer.param_groups))
        ]
