"""A run's parts and where it stands: built from settings, saved to and restored from checkpoints."""

from __future__ import annotations

import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

import fastres
from fastres.data import Loader
from fastres.data.augment import Mixing
from fastres.errors import CheckpointError, UserError
from fastres.train.checkpoint import check_classes, check_config, load_checkpoint, random_state, set_random_state
from fastres.train.distributed import World
from fastres.train.loading import open_test, open_train
from fastres.train.optim import Schedule, make_optimizer
from fastres.train.records import Row
from fastres.train.saving import Saver
from fastres.train.settings import Settings
from fastres.train.stepping import parallel

LAST, BEST = "checkpoint-last.pt", "checkpoint-best.pt"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    random.seed(settings.seed)
    numpy.random.seed(settings.seed % 2**32)


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


def make_schedule(settings: Settings, per_epoch: int, iterations: int) -> Schedule:
    """The settings' schedule, counted in iterations."""
    milestones = tuple(settings.milestones or ())
    if settings.milestones_in == "epochs":
        milestones = tuple(float(round(each * per_epoch)) for each in milestones)
    elif settings.milestones_in == "share" and any(each > 1 for each in milestones):
        raise UserError(f"milestones {list(milestones)} are shares of the run, which end at 1; see milestones_in")
    warmup = settings.warmup_iterations or round(per_epoch * (settings.warmup or 0.0))
    assert settings.lr is not None and settings.schedule is not None and settings.gamma is not None
    return Schedule(
        settings.schedule, settings.lr, iterations, warmup, milestones, settings.gamma, settings.warmup_factor,
        bool(settings.warmup_constant),
    )  # fmt: skip


class Run:
    """Everything that a checkpoint holds. ``epoch`` counts finished epochs, ``batch`` those of the unfinished one."""

    def __init__(self, settings: Settings, world: World | None = None) -> None:
        self.settings = settings = settings.resolved()
        self.world = world = world or World()
        self.out = Path(settings.out or ".")
        self.device = pick_device(settings.device)
        if world.several and self.device.type == "cuda":
            self.device = torch.device("cuda", world.local_rank)
        prepare_torch(settings)
        self.test_data, self.notes = open_test(settings, world, self.device)
        self.train_data, missing = open_train(settings, world, self.device, 0)
        self.notes += missing
        per_epoch = len(self.train_data)
        assert settings.lr is not None and settings.weight_decay is not None and settings.momentum is not None
        self.iterations = settings.iterations or per_epoch * (settings.epochs or 1)
        self.epochs = settings.epochs or -(-self.iterations // per_epoch)
        model = build_model(settings, self.train_data)
        self.config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
        model = fastres.convert_sync_bn(model) if settings.sync_bn and world.several else model
        self.model = model.to(self.device)
        if settings.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.dtype = DTYPES[settings.dtype]
        self.optimizer = make_optimizer(
            self.model, settings.lr, settings.momentum, settings.weight_decay, bool(settings.decay_all),
            bool(settings.nesterov), settings.optimizer or "sgd", settings.zero and world.several,
        )  # fmt: skip
        self.schedule = make_schedule(settings, per_epoch, self.iterations)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.mixing = (
            Mixing(self.config["num_classes"], settings.mixup or 0.0, settings.cutmix or 0.0)
            if settings.mixup or settings.cutmix
            else None
        )
        self.ema: Any = None
        if settings.ema:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        self.parallel: Any = parallel(self.model, settings, world, self.device)
        self.captured = False
        if world.rank:
            torch.manual_seed(settings.seed + 1_000_003 * world.rank)  # what a step draws differs between ranks
        self.saver = Saver(self.out, settings.keep, settings.async_save)
        self.epoch = self.batch = self.iteration = 0
        self.best = -1.0
        self.rows: list[Row] = []
        # Of the unfinished epoch: loss sum, correct, images on the device; seconds and seconds of waiting for data.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.seconds = self.waited = 0.0

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the average of weights once there is one."""
        if self.ema is not None and int(self.ema.n_averaged):
            module: nn.Module = self.ema.module
            return module
        return self.model

    def begin_epoch(self) -> None:
        """Start the data of the current epoch, at its image size."""
        self.train_data, _ = open_train(
            self.settings, self.world, self.device, self.epoch, self.epochs, self.train_data
        )
        self.train_data.set_epoch(self.epoch)

    def save(self, *names: str) -> None:
        """Write a checkpoint to each name in the run's folder. All processes call it, the first one writes."""
        self.world.same_buffers(self.model, self.ema)
        ranks = self.world.gathered({"random": random_state(), "loader": self.train_data.state_dict()})
        sums = [each.tolist() for each in self.world.gathered(self.sums.cpu())] if self.world.several else []
        if self.settings.zero and self.world.several:
            self.optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
        if not self.world.first:
            return
        state = {
            "config": self.config, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None, "scaler": self.scaler.state_dict(),
            "schedule": asdict(self.schedule), "settings": asdict(self.settings),
            "world_size": self.world.size, "ranks": ranks[1:], "rank_sums": sums,
            "loader": ranks[0]["loader"], "random": ranks[0]["random"],
            "epoch": self.epoch, "batch": self.batch, "iteration": self.iteration, "best": self.best,
            "rows": [asdict(row) for row in self.rows], "sums": self.sums.cpu(), "seconds": self.seconds,
            "waited": self.waited,
            "classes": list(self.train_data.classes), "input_shape": list(self.train_data.input_shape),
        }  # fmt: skip
        self.saver.save(state, names, self.iteration)

    def restore(self, path: Path) -> list[str]:
        """Continue from a checkpoint; returns what differs in the settings, in words.

        Raises:
            CheckpointError: it can't be read, or is of another network, other classes or another number of processes.
            DataError: it is of other data.
        """
        state = load_checkpoint(path)
        check_config(state["config"], self.config, path)
        check_classes(state.get("classes"), list(self.train_data.classes), path)
        self._check_world(state.get("world_size", 1), path)
        try:
            self._load(state, path)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise CheckpointError(f"checkpoint {path} doesn't fit this run: {error}") from error
        for group, fresh in zip(self.optimizer.param_groups, self._group_options(), strict=True):
            group.update({key: value for key, value in fresh.items() if key in group})
        saved, now = state["settings"], asdict(self.settings)
        free = {"out", "resume", "overwrite", "workers", "threads", "device", "save_every", "keep", "async_save"}
        return [f"{k} {saved[k]} -> {v}" for k, v in now.items() if k in saved and k not in free and saved[k] != v]

    def _check_world(self, size: int, path: Path) -> None:
        if size != self.world.size and not self.settings.reshard:
            raise CheckpointError(
                f"checkpoint {path} is of {size} processes, this run has {self.world.size}: their random numbers and "
                "batch statistics differ, so that it can't continue bit for bit; start as many, or give --reshard to "
                "continue with the same batches, divided anew"
            )

    def _load(self, state: dict[str, Any], path: Path) -> None:
        same = state.get("world_size", 1) == self.world.size
        mine = state if self.world.first or not same else state["ranks"][self.world.rank - 1]
        self.epoch, self.batch, self.iteration = state["epoch"], state["batch"], state["iteration"]
        self.model.load_state_dict(state["model"])
        self.train_data, _ = open_train(
            self.settings, self.world, self.device, self.epoch, self.epochs, self.train_data
        )
        self.train_data.load_state_dict(mine["loader"])
        if (state.get("ema") is None) != (self.ema is None):
            kept, asked = ("no", "one") if self.ema is not None else ("an", "none")
            raise CheckpointError(f"checkpoint {path} has {kept} average of weights (ema), and {asked} is asked for")
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.optimizer.load_state_dict(state["optimizer"])
        if same or self.world.first:
            set_random_state(mine["random"])
        self.best, self.rows = state["best"], [Row(**row) for row in state["rows"]]
        sums = state.get("rank_sums") or [state["sums"].tolist()]
        if same:
            self.sums = torch.tensor(sums[self.world.rank], dtype=torch.float64, device=self.device)
        else:
            total = torch.tensor(sums, dtype=torch.float64).sum(0)
            self.sums = (total if self.world.first else torch.zeros_like(total)).to(self.device)
        self.seconds, self.waited = state["seconds"], state["waited"]

    def _group_options(self) -> list[dict[str, Any]]:
        """Options that the command line sets anew when a run is continued."""
        decay = [self.settings.weight_decay or 0.0, 0.0]
        return [
            {"momentum": self.settings.momentum, "nesterov": self.settings.nesterov, "weight_decay": decay[index]}
            for index in range(len(self.optimizer.param_groups))
        ]
