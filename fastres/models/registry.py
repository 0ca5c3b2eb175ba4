"""The one registry of networks: names, facts, construction and weights."""

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastres.errors import ModelError

from .weights import load_weights


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a registered network with its default options.

    ``params``: learnable parameters. ``macs``: multiply-adds of convolutions and fully connected layers at ``input_size``
    (C, H, W), batch 1; BatchNorm, ReLU, pooling and additions are not counted. ``published``: the test error in ``source``,
    in percent, top-1 and for ImageNet top-5 where it is given, with how it was measured and what differs from the default
    options; empty where none is printed. ``fusible``: whether ``fused=True`` changes how it is computed.
    """

    name: str
    family: str
    source: str
    dataset: str
    input_size: tuple[int, int, int]
    num_classes: int
    params: int
    macs: int
    published: str = ""
    fusible: bool = True


_builders: dict[str, Callable[..., nn.Module]] = {}
_infos: dict[str, ModelInfo] = {}


def register(info: ModelInfo, builder: Callable[..., nn.Module]) -> None:
    """Adds a network; names are unique."""
    if info.name in _builders:
        raise ModelError(f"model {info.name!r} is registered twice")
    _builders[info.name], _infos[info.name] = builder, info


def list_models(pattern: str | None = None) -> list[str]:
    """Registered names in order of registration, filtered by a shell pattern such as ``"resnet*"``."""
    return [name for name in _builders if pattern is None or fnmatch.fnmatch(name, pattern)]


def _known(name: str) -> str:
    if name not in _builders:
        close = difflib.get_close_matches(str(name), _builders, n=3)
        hint = f"; close to {', '.join(close)}" if close else ""
        raise ModelError(f"unknown model {name!r}{hint}. fastres.list_models() gives all {len(_builders)} names.")
    return name


def model_info(name: str) -> ModelInfo:
    """Facts of one network.

    Raises:
        ModelError: unknown name, with the closest ones.
    """
    return _infos[_known(name)]


def create_model(name: str, fused: bool = True, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Builds a registered network.

    Args:
        name: see :func:`list_models`.
        fused: fused kernels, or plain PyTorch modules with the same weights and keys.
        weights: None for random initialisation; a path to a state dict (``.pt``/``.pth``/``.safetensors``) or to a
            checkpoint of ``fastres train``; or the name of torchvision's weights, such as ``"IMAGENET1K_V1"``.
        options: of the family, such as ``num_classes``, ``version``, ``shortcut``, ``in_channels``, ``memory``.

    Raises:
        ModelError: unknown name or option, weights of another architecture. CheckpointError: unreadable weights.
    """
    builder = _builders[_known(name)]
    try:
        model = builder(fused=fused, **options)
    except TypeError as error:
        raise ModelError(f"model {name!r}: {error}") from error
    if weights is not None:
        load_weights(model, name, weights)
    return model
