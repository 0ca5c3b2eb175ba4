"""Inference plans: a whole network in evaluation mode as one call into C++; see docs/inference.md."""

from typing import TYPE_CHECKING, Any

from .automatic import why_not

if TYPE_CHECKING:
    from .network import CompiledNetwork, compile

__all__ = ["CompiledNetwork", "compile", "why_not"]


def __getattr__(name: str) -> Any:
    """What makes plans is loaded on first use: every network imports this package."""
    if name in ("CompiledNetwork", "compile"):
        from . import network

        return getattr(network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
