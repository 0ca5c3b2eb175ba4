"""One training step of a network without data (fake tensors), every kernel's bytes written down as it would run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres import backends
from fastres.kernels.common.traffic import Pass
from fastres.kernels.common.triton_launch import Launch, executing_with
from fastres.ops.schemas import BACKENDS, OPS

from . import eager
from .levels import LEVELS, MODELS, Fastres, Model

BACKEND = "triton"  # whose path level "fastres" describes, unless another is asked for
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Event:
    """One operation of the step: the layer it belongs to, and its passes at each level that was asked for."""

    layer: str
    backward: bool
    op: str
    passes: Mapping[str, Sequence[Pass]]

    def bytes(self, level: str) -> float:
        return sum(p.total for p in self.passes.get(level, ()))


@dataclass
class Ledger:
    """A whole step. Events of the plain network hold level L0, those of the fused one all others."""

    model: str
    batch: int
    dtype: str
    image: tuple[int, int]
    events: list[Event] = field(default_factory=list)

    def per_image(self, level: str, backward: bool | None = None, weights: bool = True) -> float:
        """Bytes of one image; ``backward``: only of this direction. Weights are shared by the batch, ``weights=False``
        leaves them out."""
        events = (event for event in self.events if backward in (None, event.backward))
        passes = (p for event in events for p in event.passes.get(level, ()))
        return sum(p.total if weights else p.maps for p in passes) / self.batch

    def flops(self) -> float:
        """Multiply-adds x 2 of one image, forward and backward."""
        passes = (p for event in self.events for p in event.passes.get("fastres", ()))
        return sum(p.flops for p in passes) / self.batch


def ledger(
    model: str, batch: int = 256, dtype: str = "bf16", image: int | None = None, backend: str = BACKEND, **options: Any
) -> Ledger:  # fmt: skip
    """The byte ledger of one training step of a registered network. Nothing is computed and no GPU is needed.

    Args:
        model: a name that ``fastres models`` lists. dtype: of the maps, as under autocast. image: side, or the network's own.
        backend: whose path level "fastres" describes. options: of :func:`fastres.create_model`.
    """
    channels, height, width = fastres.model_info(model).input_size
    height, width = image or height, image or width
    found = Ledger(model, batch, dtype, (height, width))
    shape = (batch, channels, height, width)
    with FakeTensorMode():
        for fused in (False, True):
            network = fastres.create_model(model, fused=fused, **options).train()
            found.events += step_of(network, torch.empty(shape), DTYPES[dtype], fused, backend)
    return found


def step_of(network: nn.Module, images: Tensor, dtype: torch.dtype, fused: bool, backend: str = BACKEND) -> list[Event]:
    """The events of one step; under FakeTensorMode. ``fused``: at the levels of a fused network, else L0.

    ``backend`` decides what is kept for backward and who adds what; every op has the bytes of its fused kernels.
    """
    names = {id(module): name for name, module in network.named_modules()}
    # Only modules without children: a block that somebody watches takes no shortcuts.
    leaves = [m for m in network.modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_pre_hook(lambda m, _: backends.entering(m)) for m in leaves]
    try:
        # Tensors are fake, so nothing is launched; with an executor, Triton takes those of a machine without a GPU.
        with executing_with(_launched), backends.use_backend(backend), backends.recording(names) as layers:
            recorder = _Recorder(layers, fused, {tuple(p.shape) for p in network.parameters()})
            autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
            images = images.to(dtype).contiguous(memory_format=torch.channels_last)
            with recorder.saved(), recorder, autocast:
                loss = network(images).sum()
                recorder.in_backward = True
            with recorder.saved(), recorder:
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.events


def _launched(launch: Launch) -> None:
    raise AssertionError(f"{launch.name} was launched over fake tensors")


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd, forward and backward."""

    def __init__(self, layers: backends.Recorder, fused: bool, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers, self.weights, self.in_backward = layers, weights, False
        self.tables = {m.key: Model(m) for m in MODELS} | {LEVELS[-1].key: Fastres()} if fused else {}
        self.events: list[Event] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        op, suffix = split(name) if func.namespace == "fastres" else (name, "")
        passes: dict[str, list[Pass]] = {}
        if self.tables:
            for level, table in self.tables.items():
                passes[level] = table.passes(op, suffix, args, result, self.in_backward)
        else:
            passes[LEVELS[0].key] = eager.of(name, args, result)
        if any(passes.values()) and not _of_weights(op, args, self.weights):
            self.events.append(Event(self.layers.layer, self.in_backward, name, passes))
        return result

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Inside, a node of the backward pass names the layer whose forward saved its tensors."""

        def unpack(kept: tuple[str, Tensor]) -> Tensor:
            if self.in_backward:
                self.layers.layer = kept[0]
            return kept[1]

        with torch.autograd.graph.saved_tensors_hooks(lambda t: (self.layers.layer, t), unpack):
            yield


def _of_weights(op: str, args: Sequence[Any], shapes: set[tuple[int, ...]]) -> bool:
    """Casts and copies of parameters and of their gradients: the optimizer's business, the same at every level."""
    first = args[0] if args else None
    return (
        op in ("_to_copy", "copy_", "clone", "new_zeros") and isinstance(first, Tensor) and tuple(first.shape) in shapes
    )


def split(name: str) -> tuple[str, str]:
    """``"conv_stats_backward_triton"`` -> ``("conv_stats", "backward")``."""
    backend = next((b for b in BACKENDS if name.endswith(f"_{b}")), "")
    name = name.removesuffix(f"_{backend}")
    op = max((op for op in OPS if name.startswith(op)), key=len, default=name)
    return op, name[len(op) + 1 :]
