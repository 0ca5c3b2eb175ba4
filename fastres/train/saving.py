"""Keeping checkpoints on disk: written in a thread, the newest ones kept, what a killed run left cleared away."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import torch

from fastres.train.checkpoint import save_checkpoint

NUMBERED = re.compile(r"checkpoint-(\d{8,})\.pt")


def snapshot(value: Any) -> Any:
    """A copy in CPU memory of nested tensors and plain values, which later training steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            [snapshot(each) for each in value] if isinstance(value, list) else tuple(snapshot(each) for each in value)
        )
    return value


def numbered(out: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a folder by iteration, oldest first."""
    found = [(NUMBERED.fullmatch(path.name), path) for path in out.glob("checkpoint-*.pt")]
    return sorted((int(match.group(1)), path) for match, path in found if match)


class Saver:
    """Writes checkpoints to ``out``, at most one at a time.

    With ``asynchronous`` the state is copied at once, and a thread serialises and writes it while training goes on. A
    thread and one file, not torch.distributed.checkpoint: the state of data-parallel training is the same on every
    process, so that there is nothing to shard, and one file can replace the old one in one step.
    """

    def __init__(self, out: Path, keep: int = 1, asynchronous: bool = True) -> None:
        self._out, self._keep, self._asynchronous = out, keep, asynchronous
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: dict[str, Any], names: tuple[str, ...], iteration: int) -> None:
        """Write ``state`` to each of ``names``, and to a numbered file where more than one is kept.

        Raises:
            CheckpointError: this or the previous checkpoint can't be written; the older files are as they were.
        """
        self.wait()
        if self._keep > 1:
            names = (*names, f"checkpoint-{iteration:08d}.pt")
        if not self._asynchronous:
            self._write(state, names)
            return
        self._thread = threading.Thread(target=self._work, args=(snapshot(state), names), name="fastres-save")
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, state: dict[str, Any], names: tuple[str, ...]) -> None:
        try:
            self._write(state, names)
        except Exception as error:
            self._error = error  # raised by wait, in the thread that trains

    def _write(self, state: dict[str, Any], names: tuple[str, ...]) -> None:
        save_checkpoint(state, *(self._out / name for name in names))
        if self._keep > 1:
            for _, path in numbered(self._out)[: -self._keep]:
                path.unlink(missing_ok=True)


def clear_partial(out: Path) -> None:
    """Remove what a killed process was writing. Files of a process that lives are left."""
    for path in out.glob(".*.part"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
