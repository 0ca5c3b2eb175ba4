"""Global memory of an emulated launch: every access must lie within an argument tensor; who touched what is recorded.

Addresses are those of the CPU tensors themselves. A tensor's elements are what counts, not its extent: the gaps of a
strided view belong to nobody.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from emulation.errors import DoubleStore, Misaligned, OutOfBounds, ProgramRace


def tensors_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among a launch's arguments, those under host-side tensor descriptors included."""
    for name, value in arguments.items():
        tensor = getattr(value, "base", None) if hasattr(value, "block_shape") else value
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            yield name, tensor


class Region:
    """One storage, in cells of the smallest element size that any argument has in it."""

    def __init__(self, storage: torch.UntypedStorage, cell: int) -> None:
        self.base, self.size, self.cell = storage.data_ptr(), storage.nbytes(), cell
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self._views: dict[int, np.ndarray] = {}
        cells = self.size // cell
        self.owner = np.full(cells, -1, np.int8)  # index of the argument
        self.writer = np.zeros(cells, np.int32)  # program + 1, 0 for none
        self.reader = np.zeros(cells, np.int32)  # program + 1, 0 for none, -1 for several
        self.clock = np.zeros(0, np.int64)  # of the last store, where an ordering is kept
        self.loaded = np.zeros(cells, bool)
        self.stored = np.zeros(cells, bool)

    def view(self, width: int) -> np.ndarray:
        """The memory as unsigned integers of ``width`` bytes."""
        if width not in self._views:
            self._views[width] = self.bytes[: self.size // width * width].view(f"u{width}")
        return self._views[width]

    def add(self, index: int, tensor: torch.Tensor) -> None:
        width = tensor.element_size() // self.cell
        first = (tensor.data_ptr() - self.base) // self.cell
        strides = [s * width * self.owner.itemsize for s in tensor.stride()] + [self.owner.itemsize]
        view = np.lib.stride_tricks.as_strided(self.owner[first:], (*tensor.shape, width), strides)
        view[view < 0] = index


@dataclass
class Traffic:
    """Bytes by argument name: every unmasked lane counts in ``loaded`` and ``stored``, every address once in ``unique_``."""

    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    unique_loaded: dict[str, int] = field(default_factory=dict)
    unique_stored: dict[str, int] = field(default_factory=dict)


class GuardedMemory:
    """The memory that one launch may touch. ``program`` is the number of the program (block) in the grid."""

    def __init__(self, arguments: Mapping[str, Any], check_stores: bool = True) -> None:
        self.check_stores = check_stores
        self.names: list[str] = []
        self.program = 0
        self.ordering: Any = None  # of blocks that may wait for each other: emulation.ptx.ordering
        cells: dict[int, int] = {}
        tensors = list(tensors_of(arguments))
        for name, tensor in tensors:
            if tensor.device.type != "cpu":
                raise TypeError(f"argument {name} is on {tensor.device}: emulation runs on CPU tensors")
            start = tensor.untyped_storage().data_ptr()
            cells[start] = min(cells.get(start, 16), tensor.element_size())
        found: dict[int, Region] = {}
        for index, (name, tensor) in enumerate(tensors):
            start = tensor.untyped_storage().data_ptr()
            if start not in found:
                found[start] = Region(tensor.untyped_storage(), cells[start])
            found[start].add(index, tensor)
            self.names.append(name)
        self.regions = sorted(found.values(), key=lambda r: r.base)
        self.starts = np.array([r.base for r in self.regions], np.int64)
        self._counts = {kind: np.zeros(len(self.names), np.int64) for kind in ("load", "store")}

    def load(self, addresses: np.ndarray, size: int, programs: np.ndarray | None = None) -> None:
        """Checks and counts loads of ``size`` bytes at each address (int64, one dimension).

        ``programs``: the program of each lane, where it isn't ``program`` for all.
        """
        for region, where in self._split(addresses, size, "load"):
            cells, each = self._cells(region, addresses[where], size, "load")
            region.loaded[cells] = True
            if self.check_stores:
                self._read(region, cells, self._tags(programs, where, each))

    def store(
        self, addresses: np.ndarray, size: int, values: np.ndarray | None = None, programs: np.ndarray | None = None
    ) -> None:
        """Checks and counts stores. Two lanes may store to one address only if their ``values`` are the same."""
        for region, where in self._split(addresses, size, "store"):
            cells, each = self._cells(region, addresses[where], size, "store")
            region.stored[cells] = True
            if self.check_stores:
                self._write(region, cells, self._tags(programs, where, each))
        if self.check_stores and values is not None and len(addresses) > 1:
            order = np.argsort(addresses, kind="stable")
            ordered, kept = addresses[order], values.reshape(len(addresses), -1)[order]
            if ((ordered[1:] == ordered[:-1]) & (kept[1:] != kept[:-1]).any(axis=1)).any():
                raise DoubleStore(f"two lanes of program {self.program} store different values to one address")

    def atomic(self, addresses: np.ndarray, size: int) -> None:
        """Checks and counts atomic updates: a load and a store each, in no order, so several programs may do it."""
        for region, where in self._split(addresses, size, "atomic"):
            cells, _ = self._cells(region, addresses[where], size, "load")
            self._cells(region, addresses[where], size, "store")
            region.loaded[cells] = region.stored[cells] = True

    def gather(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """[lanes, count] unsigned elements of ``width`` bytes at checked addresses."""
        out = np.empty((len(addresses), count), f"u{width}")
        for region, where in self._regions(addresses):
            out[where] = region.view(width)[((addresses[where] - region.base) // width)[:, None] + np.arange(count)]
        return out

    def scatter(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Writes [lanes, count] unsigned elements to checked addresses."""
        width, count = values.itemsize, values.shape[1]
        for region, where in self._regions(addresses):
            region.view(width)[((addresses[where] - region.base) // width)[:, None] + np.arange(count)] = values[where]

    def traffic(self) -> Traffic:
        named = {k: {n: int(v) for n, v in zip(self.names, c, strict=True) if v} for k, c in self._counts.items()}
        result = Traffic(named["load"], named["store"])
        for region in self.regions:
            for touched, unique in ((region.loaded, result.unique_loaded), (region.stored, result.unique_stored)):
                owners = np.bincount(region.owner[touched], minlength=len(self.names)) * region.cell
                for name, count in zip(self.names, owners, strict=True):
                    if count:
                        unique[name] = unique.get(name, 0) + int(count)
        return result

    def _regions(self, addresses: np.ndarray) -> Iterator[tuple[Region, Any]]:
        """Which lanes lie in which storage, for addresses that lie in one."""
        if not len(addresses):
            return
        low, high = addresses.min(), addresses.max()
        at = int(np.searchsorted(self.starts, low, side="right")) - 1
        if at >= 0 and high < self.regions[at].base + self.regions[at].size:
            yield self.regions[at], slice(None)
            return
        at_each = np.searchsorted(self.starts, addresses, side="right") - 1
        for index in np.unique(at_each):
            yield self.regions[index], at_each == index

    def _split(self, addresses: np.ndarray, size: int, kind: str) -> Iterator[tuple[Region, Any]]:
        if not len(addresses):
            return
        if not self.regions or addresses.min() < self.starts[0]:
            raise OutOfBounds(f"{kind} at an address below every argument, program {self.program}")
        yield from self._regions(addresses)

    def _tags(self, programs: np.ndarray | None, where: Any, each: int) -> Any:
        """Program + 1 for every cell of an access."""
        if programs is None:
            return self.program + 1
        tags = programs[where] + 1
        return np.repeat(tags, each) if each > 1 else tags

    def _cells(self, region: Region, addresses: np.ndarray, size: int, kind: str) -> tuple[np.ndarray, int]:
        """The cells of an access, counted by argument, and how many each lane has; raises if one is no argument's."""
        offsets = addresses - region.base
        if (addresses % size).any():
            raise Misaligned(
                f"{kind} of {size} bytes at an address that isn't a multiple of it, program {self.program}"
            )
        outside = offsets + size > region.size
        if not outside.any():
            cells, each = offsets // region.cell, max(1, size // region.cell)
            if each > 1:
                cells = (cells[:, None] + np.arange(each)).reshape(-1)
            owners = region.owner[cells]
            least = owners.min()
            if least >= 0:
                share = min(size, region.cell)
                if least == owners.max():
                    self._counts[kind][least] += len(owners) * share
                else:
                    self._counts[kind] += np.bincount(owners, minlength=len(self.names)) * share
                return cells, each
            outside = (owners < 0).reshape(len(addresses), -1).any(axis=1)
        near = sorted({self.names[i] for i in np.unique(region.owner) if i >= 0})
        raise OutOfBounds(
            f"{kind} of {int(outside.sum())} lanes outside every argument, program {self.program}; first at byte "
            f"{int(offsets[outside][0])} of the storage ({region.size} bytes) that holds {', '.join(near)}"
        )

    def _read(self, region: Region, cells: np.ndarray, me: Any) -> None:
        writers = region.writer[cells]
        if (foreign := (writers != 0) & (writers != me)).any():
            if self.ordering is not None:
                readers = np.broadcast_to(me, len(cells))[foreign] - 1
                foreign[foreign] = ~self.ordering.sees(readers, writers[foreign] - 1, region.clock[cells[foreign]])
            if foreign.any():
                raise ProgramRace(f"a program loads what program {int(writers[foreign][0]) - 1} stores")
        readers = region.reader[cells]
        region.reader[cells] = np.where((readers == 0) | (readers == me), me, -1)
        if not isinstance(me, int) and (several := region.reader[cells] != me).any():
            region.reader[cells[several]] = -1

    def _write(self, region: Region, cells: np.ndarray, me: Any) -> None:
        writers = region.writer[cells]
        if (foreign := (writers != 0) & (writers != me)).any():
            raise DoubleStore(f"program {int(writers[foreign][0]) - 1} and another one store to one address")
        readers = region.reader[cells]
        if ((readers != 0) & (readers != me)).any():
            raise ProgramRace("a program stores what another program loads")
        region.writer[cells] = me
        if self.ordering is not None:
            if not len(region.clock):
                region.clock = np.zeros(len(region.writer), np.int64)
            region.clock[cells] = self.ordering.clock[np.asarray(me) - 1]
        if not isinstance(me, int) and (region.writer[cells] != me).any():
            raise DoubleStore("two programs store to one address")
