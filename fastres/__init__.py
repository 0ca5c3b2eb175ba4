"""fastres: residual networks with fused conv-BatchNorm-ReLU-add kernels, drop-in for torchvision's.

model = fastres.resnet50(fused=True)
model.load_state_dict(torchvision_model.state_dict())
"""

from typing import TYPE_CHECKING, Any

from . import errors
from ._library import build_info
from ._version import __version__

from .ops import batch_norm_act, bn_coefficients, conv_act, conv_stats  # isort: skip
from .ops import scale_shift_act, scale_shift_act_mean, scale_shift_act_pool  # isort: skip
from .backends import use_backend
from .models import (
    create_model,
    list_models,
    model_info,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from .nn import convert_sync_bn

if TYPE_CHECKING:
    from . import export
    from .explanation import explain
    from .fusion import fuse
    from .inference import CompiledNetwork, compile
    from .tuner import tune

__all__ = [
    "CompiledNetwork",
    "__version__",
    "batch_norm_act",
    "bn_coefficients",
    "build_info",
    "compile",
    "conv_act",
    "conv_stats",
    "convert_sync_bn",
    "create_model",
    "errors",
    "explain",
    "export",
    "fuse",
    "list_models",
    "model_info",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "scale_shift_act",
    "scale_shift_act_mean",
    "scale_shift_act_pool",
    "tune",
    "use_backend",
]

_LAZY = {
    "CompiledNetwork": "inference",
    "compile": "inference",
    "explain": "explanation",
    "fuse": "fusion",
    "tune": "tuner",
}


def __getattr__(name: str) -> Any:
    """Loads what most programs never need on first use: torch.fx is slow to import."""
    from importlib import import_module

    if name == "export":
        return import_module("fastres.export")
    if name in _LAZY:
        value = getattr(import_module(f"fastres.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastres' has no attribute {name!r}")
