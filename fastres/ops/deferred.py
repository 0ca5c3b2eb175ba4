"""Implementations that are imported at their first call: what they need is slow to import, or may be missing."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from fastres.kernels.common import triton_launch


def triton(op: str, function: str) -> Callable[..., Any]:
    """``kernels/<op>/triton_backend.py``'s ``function``, for the dispatcher.

    Raises, when called:
        BackendError: Triton can't run on the tensors given, with the reason.
    """

    def implementation(*arguments: Any) -> Any:
        tensor = next(a for a in arguments if isinstance(a, Tensor))
        triton_launch.require(tensor.device.type)
        return getattr(import_module(f"fastres.kernels.{op}.triton_backend"), function)(*arguments)

    implementation.__name__ = f"{op}_{function}_triton"
    return implementation
