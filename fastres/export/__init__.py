"""Networks as files for other programs: ONNX, torch.export, AOTInductor, safetensors.

:func:`save` writes a network and checks the file against the network's own outputs; :func:`load` opens such a file.
"""

from typing import TYPE_CHECKING, Any

from .formats import FORMATS, Format

if TYPE_CHECKING:
    from .loading import Program, load
    from .random_weights import untrained
    from .saving import Exported, save

__all__ = ["FORMATS", "Exported", "Format", "Program", "load", "save", "untrained"]

_LAZY = {"Exported": "saving", "Program": "loading", "load": "loading", "save": "saving", "untrained": "random_weights"}


def __getattr__(name: str) -> Any:
    """Loads the writers on first use: the command line's help needs the formats only."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
