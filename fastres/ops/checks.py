"""What the public functions ask of their arguments, with the words for what is wrong. Autocast is applied here as well."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres.errors import InputError

Size2 = int | Sequence[int]


def pair(value: Size2) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts maps and conv weights to autocast's dtype, as PyTorch's own convolutions do; coefficients keep theirs."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def check_map(name: str, x: Tensor, channels: int | None = None) -> None:
    """Raises InputError unless ``x`` is a floating-point [N, C, H, W] map with ``channels`` channels."""
    if x.dim() != 4:
        raise InputError(f"{name}: expected a 4-D tensor [N, C, H, W], got {x.dim()}-D with shape {list(x.shape)}")
    if not x.is_floating_point():
        raise InputError(
            f"{name}: expected a floating-point tensor, got {x.dtype}; convert it, e.g. images.float() / 255"
        )
    if channels is not None and x.shape[1] != channels:
        raise InputError(f"{name}: expected {channels} channels, got {x.shape[1]} (shape {list(x.shape)})")


def check_conv(op: str, x: Tensor, weight: Tensor, groups: int) -> None:
    if weight.dim() != 4:
        raise InputError(f"{op}: weight must be [K, C/groups, R, S], got shape {list(weight.shape)}")
    check_map(f"{op} input", x, weight.shape[1] * groups)
    if x.device != weight.device:
        raise InputError(f"{op}: input is on {x.device}, but weight is on {weight.device}; move one of them")
    if x.dtype != weight.dtype:
        raise InputError(f"{op}: input is {x.dtype}, but weight is {weight.dtype}; convert one, or use autocast")


def check_vectors(op: str, like: Tensor, channels: int, **vectors: Tensor | None) -> None:
    given = [name for name, v in vectors.items() if v is not None]
    if given and len(given) != len(vectors):
        missing = [name for name in vectors if name not in given]
        raise InputError(f"{op}: {', '.join(given)} given without {', '.join(missing)}")
    for name, v in vectors.items():
        if v is not None and (v.dim() != 1 or v.shape[0] != channels):
            raise InputError(f"{op}: {name} must be [{channels}], one value per channel, got shape {list(v.shape)}")
        if v is not None and v.device != like.device:
            raise InputError(f"{op}: {name} is on {v.device}, but the map is on {like.device}")


def check_residual(op: str, y: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    if residual.shape != y.shape:
        raise InputError(
            f"{op}: residual has shape {list(residual.shape)}, but the map has {list(y.shape)}; a block "
            "that changes shape needs a projection or padding shortcut"
        )
    if residual.device != y.device or residual.dtype != y.dtype:
        raise InputError(f"{op}: residual is {residual.dtype} on {residual.device}, the map {y.dtype} on {y.device}")


def checked_point(
    op: str, y: Tensor, main: Sequence[Tensor], residual: Tensor | None, other: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """(y, residual) in autocast's dtype, if everything fits together."""
    y, residual = autocast(y, residual)  # type: ignore[assignment]
    check_map(f"{op} input", y)
    check_vectors(op, y, y.shape[1], **dict(zip(("scale", "center", "shift"), main, strict=True)))
    check_residual(op, y, residual)
    check_vectors(op, y, y.shape[1], **dict(zip(("res_scale", "res_center", "res_shift"), other, strict=True)))
    return y, residual
