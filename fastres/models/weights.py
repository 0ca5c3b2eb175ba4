"""Weights from files and from torchvision, loaded strictly: every key and every shape must be the network's."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastres.errors import CheckpointError, ModelError

from .base import METADATA, architecture, check_architecture

_SHOWN = 3  # keys of each kind that an error names


def load_weights(model: nn.Module, name: str, weights: str | Path) -> None:
    """Loads a file or torchvision's named weights into ``model``, strictly.

    Raises:
        ModelError: they are of another architecture or number of classes; the message names keys and shapes.
        CheckpointError: there is no such file, or it can't be read.
    """
    path = Path(weights)
    looks_like_file = path.exists() or path.suffix in (".pt", ".pth", ".safetensors") or len(path.parts) > 1
    if not looks_like_file and getattr(model, "config", {}).get("version") == "v1":
        raise ModelError(f"torchvision's weights are of version v1.5, but {name!r} was built as v1")
    state = _read(path) if looks_like_file else _torchvision_weights(name, str(weights))
    load_state(model, state, str(weights))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """``model.load_state_dict(state)`` with an error that fits on a line.

    Raises:
        ModelError: another architecture, missing or unexpected keys, other shapes; nothing was loaded.
    """
    own = model.state_dict()
    both = [key for key in own if key in state]
    shapes = [
        f"{key} {list(state[key].shape)} (the model has {list(own[key].shape)})"
        for key in both
        if isinstance(state[key], Tensor) and state[key].shape != own[key].shape
    ]
    kinds = {
        # PyTorch itself forgives state dicts that are older than this counter.
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "of another shape": shapes,
    }
    found = [f"{what}: {_some(names)}" for what, names in kinds.items() if names]
    try:
        check_architecture(model, state)
        if found:  # PyTorch would copy what fits before it complains about the rest
            raise ModelError(f"these weights don't fit the network; {'; '.join(found)}")
        model.load_state_dict(state)
    except (RuntimeError, ModelError) as error:
        raise ModelError(f"{source}: {error}") from error


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read(path: Path) -> Mapping[str, Tensor]:
    import torch

    if not path.exists():
        raise CheckpointError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if isinstance(content, dict) and "model" in content and isinstance(content["model"], dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return content


def read_safetensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """(state dict, what fastres wrote about the network) of a safetensors file; nothing is known of others' files.

    Raises:
        CheckpointError: it can't be read.
    """
    from safetensors import safe_open

    state: OrderedDict[str, Tensor] = OrderedDict()
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                state[key] = file.get_tensor(key)
            about = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if not isinstance(about, dict):
                raise ValueError(f"its metadata {METADATA!r} is a {type(about).__name__}, expected an object")
    except Exception as error:  # safetensors raises a type of its own, json and torch raise others
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if isinstance(about.get("config"), dict):
        state._metadata = OrderedDict({"": {METADATA: architecture(about["config"])}})  # type: ignore[attr-defined]
    return state, about


def _torchvision_weights(name: str, weights: str) -> Mapping[str, Tensor]:
    try:
        from torchvision.models import get_model_weights
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            f"weights={weights!r} names torchvision's weights, but torchvision can't be used: {error}"
        ) from error
    try:
        return get_model_weights(name)[weights].get_state_dict(progress=False, check_hash=True)
    except (KeyError, ValueError) as error:
        raise ModelError(f"torchvision has no weights {weights!r} for {name!r}, and no such file exists") from error
    except OSError as error:
        raise CheckpointError(f"torchvision's weights {weights!r} for {name!r} can't be downloaded: {error}") from error
