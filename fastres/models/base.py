"""What every network shares: input checks, frozen BatchNorm, and an architecture that travels with the state dict."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import InputError, ModelError
from fastres.nn.statistics import BatchNorm
from fastres.ops.checks import check_map

METADATA = "fastres"  # the entry of ``state_dict()._metadata``, and of a safetensors file's metadata
# Options that change the function without changing a single key or shape: these must travel with a checkpoint.
_INVISIBLE = ("name", "version", "shortcut")


class Network(nn.Module):
    """Base of all networks.

    ``config`` holds everything :func:`fastres.create_model` needs to build the same network again. Its architecture part
    is written into ``state_dict()._metadata`` (keys and tensors stay torchvision's) and compared on loading, because a v1
    state dict would load into a v1.5 network without any error and give wrong logits.
    """

    config: dict[str, Any]
    in_channels: int
    _bn_frozen = False

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_write_architecture)
        self.register_load_state_dict_pre_hook(_check_architecture)

    def check_input(self, x: Tensor) -> None:
        """Raises InputError unless ``x`` is a floating-point [N, in_channels, H, W] on the model's device."""
        check_map(type(self).__name__, x, self.in_channels)
        weight = next(self.parameters())
        if x.device != weight.device:
            raise InputError(f"{type(self).__name__}: input is on {x.device}, but the model is on {weight.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(
                f"{type(self).__name__}: input is {x.dtype}, but the model is {weight.dtype}; "
                "convert one of them, or run under torch.autocast"
            )

    def freeze_bn(self, frozen: bool = True) -> "Network":
        """Freezes every BatchNorm: running statistics are used and kept, weight and bias are not trained.

        Holds through later ``train()`` calls until ``freeze_bn(False)``. Returns the model.
        """
        self._bn_frozen = frozen
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.train(self.training and not frozen)
                for p in module.parameters(recurse=False):
                    p.requires_grad_(not frozen)
        return self

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        if self._bn_frozen:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``config`` that a state dict's keys and shapes don't show."""
    return {k: config[k] for k in _INVISIBLE if k in config}


def check_architecture(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raises ModelError where ``state_dict`` says that it is of another architecture than ``module``.

    A foreign state dict (torchvision's, or one that lost its metadata) says nothing and passes.
    """
    stored = getattr(state_dict, "_metadata", {}).get("", {}).get(METADATA)
    if stored is not None and isinstance(module, Network):
        _compare(module, stored)


def _compare(module: Network, stored: Mapping[str, Any]) -> None:
    different = {k: (v, module.config.get(k)) for k, v in stored.items() if v != module.config.get(k)}
    if different:
        words = ", ".join(f"{k} {given!r} (the model has {own!r})" for k, (given, own) in different.items())
        raise ModelError(
            f"this state dict belongs to another architecture: {words}. Tensor shapes may agree, results won't."
        )


def _write_architecture(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    assert isinstance(module, Network)
    local_metadata[METADATA] = architecture(module.config)


def _check_architecture(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
) -> None:
    assert isinstance(module, Network)
    stored = local_metadata.get(METADATA)
    if stored is not None:
        _compare(module, stored)


def initialise(model: nn.Module) -> None:
    """He-normal convolutions (fan-out), unit BatchNorm, as section 3.4 of 1512.03385 refers to 1502.01852, Eq. 14."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
