"""Shared memory of the blocks that run side by side: poisoned with NaN, guarded, with asynchronous copies and a race check.

Between two barriers no thread may touch what another thread writes. An asynchronous copy counts as a write of its
thread from its issue on, may not be touched at all until its thread has waited for it, and is a write again then, so
that other threads need a barrier after the wait.
"""

from dataclasses import dataclass

import numpy as np

from emulation.errors import SharedMemoryError, SharedMemoryRace

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class _Copy:
    """The lanes of one cp.async that are still in flight."""

    addresses: np.ndarray  # int64, in the memory of all blocks
    threads: np.ndarray
    groups: np.ndarray  # the number of the thread's group that this copy belongs to
    data: np.ndarray  # [lanes, size] uint8


class SharedMemory:
    def __init__(self, size: int, blocks: int, threads: int, cell: int) -> None:
        """``threads``: of one block. ``cell``: bytes that the race check tells apart."""
        self.size, self.stride, self.cell = size, -(-max(size, 1) // 128) * 128, cell
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.stride, threads)  # by thread
        self.bytes = np.empty(self.stride * blocks, np.uint8)
        self.views = {width: self.bytes.view(dtype) for width, dtype in UNSIGNED.items()}
        cells = len(self.bytes) // cell
        self.writer = np.zeros(cells, np.int32)  # thread + 1, 0 for none, -1 - warp after a warp's barrier
        self.reader = np.zeros(cells, np.int32)  # the same, and MANY
        self.flight = np.zeros(cells, bool)
        self.committed = np.zeros(blocks * threads, np.int64)
        self.copies: list[_Copy] = []
        self.race_check = self.early = True
        self.ambiguous = 0  # stores whose lanes disagree

    MANY = np.int32(2**30)

    def reset(self, race_check: bool, early: bool) -> None:
        self.race_check, self.early, self.ambiguous = race_check, early, 0
        self.bytes.fill(0xFF)
        self.flight.fill(False)
        self.committed.fill(0)
        self.copies.clear()
        self.barrier()

    def barrier(self, blocks: np.ndarray | None = None) -> None:
        """Of all blocks, or of those that ``blocks`` [blocks] names."""
        if blocks is None:
            self.writer.fill(0)
            self.reader.fill(0)
            return
        for tags in (self.writer, self.reader):
            tags.reshape(len(blocks), -1)[blocks] = 0

    def warp_barrier(self, threads: np.ndarray) -> None:
        """The threads of a warp see each other's accesses from here on; other warps don't."""
        active = np.zeros(len(self.base) + 1, bool)
        active[threads + 1] = True
        for tags in (self.writer, self.reader):
            mine = (tags > 0) & (tags < self.MANY)
            mine[mine] = active[tags[mine]]
            tags[mine] = -1 - (tags[mine] - 1) // 32

    def read(self, addresses: np.ndarray, threads: np.ndarray, width: int, count: int) -> np.ndarray:
        """[lanes, count] elements of ``width`` bytes."""
        at = self._at(addresses, threads, width * count)
        if self.race_check:
            self._reading(*self._cells(at, threads, width * count))
        return self.views[width][self._elements(at, width, count)]

    def write(self, addresses: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        width, count = values.itemsize, values.shape[1]
        at = self._at(addresses, threads, width * count)
        cells, tags = self._cells(at, threads, width * count)
        elements = self._elements(at, width, count)
        if self.race_check:
            self._writing(cells, tags)
        self.views[width][elements] = values
        if self.race_check:
            self.writer[cells] = tags
            self._same_values(cells, tags, (self.views[width][elements] != values).any())

    def atomic_read(self, addresses: np.ndarray, threads: np.ndarray, width: int) -> np.ndarray:
        """Atomics are ordered among themselves: they don't race with each other, nor are they checked against the rest."""
        return self.views[width][self._elements(self._at(addresses, threads, width), width, 1)]

    def atomic_write(self, addresses: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        self.views[values.itemsize][
            self._elements(self._at(addresses, threads, values.itemsize), values.itemsize, 1)
        ] = values

    def issue(self, addresses: np.ndarray, threads: np.ndarray, data: np.ndarray) -> None:
        """cp.async: ``data`` [lanes, size] uint8 arrives at any time until the thread waits for its group."""
        at = self._at(addresses, threads, data.shape[1])
        cells, tags = self._cells(at, threads, data.shape[1])
        if self.race_check:
            self._writing(cells, tags)
            self.flight[cells] = True
        if self.early:
            self.bytes[at[:, None] + np.arange(data.shape[1])] = data
        self.copies.append(_Copy(at, threads, self.committed[threads], data))

    def commit(self, threads: np.ndarray) -> None:
        self.committed[threads] += 1

    def wait(self, threads: np.ndarray, groups: int) -> None:
        """All but the latest ``groups`` groups of each thread have arrived."""
        limit = np.full(len(self.committed), -1, np.int64)
        limit[threads] = self.committed[threads] - groups
        kept = []
        for copy in self.copies:
            lands = copy.groups < limit[copy.threads]
            if not lands.any():
                kept.append(copy)
                continue
            at, here = copy.addresses[lands], copy.threads[lands]
            cells, tags = self._cells(at, here, copy.data.shape[1])
            self.flight[cells] = False
            self.writer[cells] = tags
            if not self.early:
                self.bytes[at[:, None] + np.arange(copy.data.shape[1])] = copy.data[lands]
            if not lands.all():
                rest = ~lands
                kept.append(_Copy(copy.addresses[rest], copy.threads[rest], copy.groups[rest], copy.data[rest]))
        self.copies = kept

    def _at(self, addresses: np.ndarray, threads: np.ndarray, size: int) -> np.ndarray:
        """Where the accesses of each thread's block lie in the memory of all blocks."""
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise SharedMemoryError(f"access of {size} bytes outside the block's {self.size} bytes of shared memory")
        if (addresses % size).any():
            raise SharedMemoryError(f"misaligned access of {size} bytes to shared memory")
        return addresses + self.base[threads]

    def _same_values(self, cells: np.ndarray, tags: np.ndarray, differ: bool) -> None:
        """After a store: lanes that share an address must agree; those of one warp may differ, which is counted.

        Triton stores a reduction's result from every lane that has it. If its combine function isn't commutative to the
        last bit the lanes differ by rounding, and which of them wins isn't defined.
        """
        if differ and ((last := self.writer[cells]) != tags).any():
            if ((last - 1) // 32 != (tags - 1) // 32).any():
                raise SharedMemoryRace("two warps write different values to one address in one instruction")
            self.ambiguous += 1

    @staticmethod
    def _elements(at: np.ndarray, width: int, count: int) -> np.ndarray:
        return (at // width)[:, None] + np.arange(count)

    def _cells(self, at: np.ndarray, threads: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The cells of an access and the thread's tag for each."""
        count = size // self.cell
        tags = (threads + 1).astype(np.int32)
        if count == 1:
            return at // self.cell, tags
        return ((at // self.cell)[:, None] + np.arange(count)).reshape(-1), np.repeat(tags, count)

    def _foreign(self, found: np.ndarray, tags: np.ndarray) -> bool:
        """Whether a tag in ``found`` is of a thread that isn't ordered with the one in ``tags``."""
        other = (found != 0) & (found != tags)
        return bool(other.any()) and bool((other & (found != -1 - (tags - 1) // 32)).any())

    def _reading(self, cells: np.ndarray, tags: np.ndarray) -> None:
        if self.flight[cells].any():
            raise SharedMemoryRace("reads what an asynchronous copy that nobody waited for brings")
        if self._foreign(self.writer[cells], tags):
            raise SharedMemoryRace("reads what another thread writes, with no barrier between them")
        readers = self.reader[cells]
        self.reader[cells] = np.where((readers == 0) | (readers == tags), tags, self.MANY)
        shared = self.reader[cells] != tags
        if shared.any():
            self.reader[cells[shared]] = self.MANY

    def _writing(self, cells: np.ndarray, tags: np.ndarray) -> None:
        if self.flight[cells].any():
            raise SharedMemoryRace("writes where an asynchronous copy that nobody waited for goes")
        if self._foreign(self.writer[cells], tags):
            raise SharedMemoryRace("writes what another thread writes, with no barrier between them")
        if self._foreign(self.reader[cells], tags):
            raise SharedMemoryRace("writes what another thread reads, with no barrier between them")
