"""Whether the CUDA kernels of batch_norm_act can keep a map on a GPU: ``make_plan`` of cuda_problem.h, to choose a backend."""

from typing import NamedTuple

THREADS, BLOCKS = 256, 2
ITEMS = {False: 8, True: 4}  # vectors of each kept map in a thread's registers, by "backward"
BYTES = 32
THINNEST = 2


class Chip(NamedTuple):
    """What of a GPU decides: multiprocessors, bytes of shared memory of one, and the most that a block may ask for."""

    multiprocessors: int
    shared_per_multiprocessor: int
    shared_per_block: int


def _up(a: int, b: int) -> int:
    return -(-a // b)


def refusal(chip: Chip, rows: int, channels: int, size: int, aligned: bool = True, backward: bool = True) -> str | None:
    """``None`` if a map [rows, channels] of elements of ``size`` bytes fits, else the reason. The backward pass keeps two maps,
    so what fits there fits forward. ``aligned``: all maps begin at multiples of 16 bytes."""
    if rows == 0 or channels == 0:
        return None
    vector = 16 // size if aligned and channels * size % 16 == 0 else 1
    blocks = chip.multiprocessors * BLOCKS
    across = max(1, BYTES // (vector * size))
    while across > 1 and across // 2 * vector >= channels:
        across //= 2
    while across < 32 and _up(channels, across * vector) > blocks:
        across *= 2
    groups = _up(channels, across * vector)
    if groups > blocks:
        return "it has more channels than the blocks of one launch can own"
    down = THREADS // across
    parts = max(1, min(_up(rows, down * THINNEST), blocks // groups))
    in_shared = max(0, _up(_up(rows, parts), down) - ITEMS[backward])
    fixed = _up((max(vector * (THREADS + 1), 2 * THREADS) + 4 * across * vector) * 4, 128) * 128
    room = min(chip.shared_per_block, chip.shared_per_multiprocessor // BLOCKS - 1024)
    if in_shared > (room - fixed) // (THREADS * vector * size * (2 if backward else 1)):
        return "its map is larger than the registers and the shared memory of all multiprocessors"
    return None
