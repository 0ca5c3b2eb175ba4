"""Several processes, started by torchrun: who they are, what they exchange besides gradients, and how they end together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastres.errors import RankError, UserError

TIMEOUT = timedelta(minutes=10)  # of a collective; a rank that waits longer has lost another one
ERROR_KEY = "fastres/error"


@dataclass(frozen=True)
class World:
    """This process among all of the run. A run of one process has rank 0 of 1 and exchanges nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def any(self, flag: int, device: torch.device) -> int:
        """The largest ``flag`` of all processes: whether, and by which signal, one of them was asked to stop."""
        if not self.several:
            return flag
        value = torch.tensor([flag], device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value.item())

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes, as a new tensor of the same shape."""
        if not self.several:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gathered(self, value: Any) -> list[Any]:
        """One plain object of each process, in the order of ranks, on every process."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def same_buffers(self, *models: nn.Module | None) -> None:
        """Give every process rank 0's buffers. Running statistics differ between ranks until DDP's next forward pass, so
        a checkpoint or an evaluation in between would depend on the rank."""
        if self.several:
            with torch.no_grad():
                for model in models:
                    for buffer in model.buffers() if model is not None else ():
                        dist.broadcast(buffer, 0)


def join_world(device: str) -> World:
    """Join the processes that torchrun started; a process started without it is alone.

    Uses NCCL on GPUs and gloo on the CPU.

    Raises:
        UserError: torchrun's variables are incomplete, or there are more processes than GPUs.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World()
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except (KeyError, ValueError) as error:
        raise UserError(f"RANK and WORLD_SIZE must both be set to numbers, as torchrun does: {error}") from error
    if size == 1:
        return World()
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "give torchrun --nproc-per-node no more than that"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # torchrun's store outlives a restart, and the new processes would find the dead ones' addresses in it. Over
            # several machines the agents may count restarts differently: there torchrun has to make a store for each
            # start (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, see the examples).
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return World(rank, size, local_rank)


def leave_world() -> None:
    """End the process group, so that torch has nothing to warn of."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def tell_others(world: World, error: BaseException) -> None:
    """Leave this process's error where the others look when a collective fails."""
    if world.several and dist.is_initialized():
        try:
            _store().set(ERROR_KEY, f"rank {world.rank}: {type(error).__name__}: {' '.join(str(error).split())}")
        except RuntimeError:
            pass  # the store is gone, and with it whoever could read this


def error_of_others(world: World, seen: BaseException) -> RankError:
    """What to raise instead of ``seen``, the error that the loss of another process causes in a collective."""
    reason = "it left no message (killed, or out of memory)"
    try:
        store = _store()
        store.wait([ERROR_KEY], timedelta(seconds=2))
        reason = store.get(ERROR_KEY).decode()
    except (RuntimeError, ValueError):
        pass  # nobody left a message
    return RankError(
        f"rank {world.rank} of {world.size} ends because another process did: {reason}; "
        f"seen here as {str(seen).splitlines()[0] if str(seen) else type(seen).__name__}"
    )


def lost_another(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other side is gone."""
    texts = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "ProcessGroup", "Broken pipe", "Socket")
    return isinstance(error, dist.DistBackendError) or (
        isinstance(error, RuntimeError) and not isinstance(error, UserError) and any(t in str(error) for t in texts)
    )


class Shard:
    """The part of each batch of a loader that belongs to one process: the ``rank``-th of ``size`` contiguous parts.

    Every process sees all batches in the same order, so that a step is that of one process on the joint batch, and a
    position in the data means the same for any number of processes.
    """

    def __init__(self, loader: Any, world: World) -> None:
        self._loader, self._world = loader, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, size = self._world.rank, self._world.size
        for images, labels in self._loader:
            count = len(labels)
            part = slice(count * rank // size, count * (rank + 1) // size)
            if part.stop > part.start:
                yield images[part], labels[part]
