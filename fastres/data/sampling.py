"""Which sample comes when, on which process, and with which random numbers.

Everything here is a function of seed, epoch and the sample's number. Neither the engine, the batch size, the number of
threads nor the number of processes changes what happens to a sample, so a run can be resumed on other processes.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from fastres.errors import DataError, UserError

# SplitMix64 (Steele, Lea, Flood 2014): the n-th number of a stream is a hash of n, so any can be had alone.
_STEP, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def epoch_generator(seed: int, epoch: int, position: int = 0) -> torch.Generator:
    """A CPU generator whose stream depends on all three numbers; nearby numbers give unrelated streams."""
    mixed = random.Random(f"{seed}/{epoch}/{position}").getrandbits(63)  # str seeds are hashed by SHA-512: stable
    return torch.Generator().manual_seed(mixed)


def uniforms(seed: int, epoch: int, samples: np.ndarray, count: int, purpose: str) -> np.ndarray:
    """float64 ``[n, count]`` in [0, 1): row ``i`` depends on seed, epoch, purpose and ``samples[i]`` only."""
    base = np.uint64(random.Random(f"{seed}/{epoch}/{purpose}").getrandbits(64))
    numbers = samples.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z: np.ndarray = base + numbers * _STEP
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53


class Plan:
    """How the samples of an epoch are cut into steps, and a step into the batches of ``world_size`` processes.

    Step ``k`` takes the ``k``-th ``batch_size * world_size`` samples of the epoch's order, process ``r`` the ``r``-th
    ``batch_size`` of them: together the processes see what one process with the joint batch would see. What is left
    for the last step is shared evenly. If it is less than one sample for each process, the last two steps are shared
    evenly instead. So every process makes the same number of steps, no batch is empty and no sample comes twice.
    """

    def __init__(self, samples: int, batch_size: int, rank: int = 0, world_size: int = 1, drop_last: bool = False):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"rank must be in 0 to world_size - 1, got rank {rank} of world_size {world_size}")
        whole = batch_size * world_size
        full, rest = divmod(samples, whole)
        shares = [(step * whole + rank * batch_size, step * whole + (rank + 1) * batch_size) for step in range(full)]
        if rest and not drop_last:
            if rest >= world_size:
                shares.append(_share(full * whole, samples, rank, world_size))
            elif full and batch_size > 1:
                middle = (full - 1) * whole + (whole + rest + 1) // 2
                shares[-1] = _share((full - 1) * whole, middle, rank, world_size)
                shares.append(_share(middle, samples, rank, world_size))
            else:
                raise DataError(f"{samples} samples can't be shared by {world_size} processes; use fewer processes")
        self._shares = shares

    def __len__(self) -> int:
        return len(self._shares)

    def __getitem__(self, step: int) -> slice:
        """This process's part of the epoch's order in a step."""
        return slice(*self._shares[step])


def _share(begin: int, end: int, rank: int, world_size: int) -> tuple[int, int]:
    count = end - begin
    return begin + count * rank // world_size, begin + count * (rank + 1) // world_size
