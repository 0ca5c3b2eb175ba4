"""Bytes that one training step keeps between forward and backward."""

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd is asked to save for backward: each storage once, parameters left out, the input included."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    keep: list[Tensor] = []  # a freed storage's address would be used again

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
            keep.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    return sum(seen.values())


class _Allocations(TorchDispatchMode):
    """Remembers every storage that an operation returned, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out


def held_bytes(model: nn.Module, x: Tensor) -> int:
    """What is really alive after the forward pass, kept by whatever means, found without autograd's hooks.

    The cross-check of :func:`saved_bytes`: a module that hid maps in closures or attributes would show here.
    Parameters, buffers and the input are older than the pass and not counted.
    """
    mine = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    with _Allocations() as allocations:
        loss = model(x).sum()
    gc.collect()
    alive = sum(size for key, (ref, size) in allocations.storages.items() if key not in mine and not ref.expired())
    del loss
    return alive


def _status_bytes(name: str) -> int:
    """A size from /proc/self/status. Not getrusage: its ru_maxrss starts at that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def _measure_rss(build: Callable[[], tuple[nn.Module, Tensor]], queue: Any) -> None:
    model, x = build()
    model(x[:1]).sum().backward()  # gradients and what is cached exist before the measured step
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident memory so far
    before = _status_bytes("VmRSS")
    model(x).sum().backward()
    queue.put(_status_bytes("VmHWM") - before)


def step_rss_bytes(build: Callable[[], tuple[nn.Module, Tensor]]) -> int:
    """By how much one training step raises the process's highest resident memory, measured in a fresh process (Linux).

    Args:
        build: a picklable function that gives the model and a batch of several images.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_rss, args=(build, queue))
    process.start()
    size = queue.get(timeout=600)
    process.join()
    return int(size)
