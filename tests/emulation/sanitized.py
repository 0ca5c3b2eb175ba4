"""An executor for cuda.py: the same kernels in a program of their own, under ThreadSanitizer or AddressSanitizer and UBSan.

ThreadSanitizer finds a missing barrier on any schedule, wherever the numbers happen to be right; AddressSanitizer finds
accesses past the end of a tensor or of shared memory. Both name the line. Static shared memory is one for all blocks
here: kernels of cooperative launches must have theirs dynamic.
"""

import ctypes
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emulation import cuda, errors
from emulation.memory import tensors_of

SANITIZERS = {
    "thread": ("-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
DEFINED = {"thread": ("-DFASTRES_SANITIZED", "-DFASTRES_TSAN"), "address": ("-DFASTRES_SANITIZED", "-DFASTRES_ASAN")}
MAIN = cuda.HERE / "device" / "sanitized_main.cpp"


@dataclass(frozen=True)
class Sanitized:
    """``sanitizer``: thread, or address. The rest as in Fibers; for threads it doesn't matter when copies land."""

    sanitizer: str
    seed: int = 0
    order: str = "forward"
    landing: str = "late"

    def execute(
        self, library: cuda.Library, function: str, problem: ctypes.Structure, tensors: Mapping[str, Any]
    ) -> None:
        program = build(library, self.sanitizer)
        regions = list(merged(tensors))
        settings = cuda.Fibers(self.seed, self.order, self.landing).settings()
        raw = bytes(problem) + bytes(-len(bytes(problem)) % 8)
        parts = [struct.pack("Q", len(function)), function.encode(), bytes(settings), struct.pack("Q", len(raw)), raw]
        parts.append(struct.pack("Q", len(regions)))
        for address, data in regions:
            parts += [struct.pack("QQ", address, len(data)), data.tobytes()]
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder) / "given", Path(folder) / "found"
            given.write_bytes(b"".join(parts))
            environment = {
                **os.environ,
                "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:atexit_sleep_ms=0",
                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            }
            done = subprocess.run(
                [str(program), str(given), str(found)], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                raise_report(done.stderr)
            written, at = np.fromfile(found, np.uint8), 0
            for _, data in regions:
                data[:] = written[at : at + len(data)]
                at += len(data)

    def __str__(self) -> str:
        return f"{self.sanitizer}-sanitizer-{self.seed}"


def build(library: cuda.Library, sanitizer: str) -> Path:
    """The program, kept by the contents of its sources."""
    options = ("-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", *DEFINED[sanitizer])
    includes = (f"-I{cuda.ROOT}", f"-I{cuda.HERE}", *cuda.WARNINGS, "-c")
    runtime = [cuda.compiled((*options, *includes), file, ".o") for file in (cuda.RUNTIME, MAIN)]
    kernels = cuda.compiled((*options, *SANITIZERS[sanitizer], *library.flags, *includes), library.source, ".o")
    # Functions are found by their names.
    linking = (SANITIZERS[sanitizer][0], "-rdynamic", "-ldl")
    return cuda.linked(linking, [kernels, *runtime], f"{library.source.stem}-{sanitizer}", "")


def merged(tensors: Mapping[str, Any]) -> Iterator[tuple[int, np.ndarray]]:
    """Address and bytes of every piece of memory that tensors cover; overlapping ones are one piece."""
    spans = []
    for _, tensor in tensors_of(tensors):
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append((start, start + (last + 1) * tensor.element_size(), tensor))
    spans.sort(key=lambda span: span[0])
    while spans:
        start, end, tensor = spans.pop(0)
        while spans and spans[0][0] < end:
            end = max(end, spans.pop(0)[1])
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        first = start - storage.data_ptr()
        yield start, whole[first : first + end - start]


def raise_report(text: str) -> None:
    if found := re.search(r"^EMULATION (.*)", text, re.M):
        cuda.raise_error(found[1])
    lines = re.findall(r"#\d+ .*? in (.*)|#\d+ (.*)", text)
    where = [re.sub(r" \(\S+\+0x.*", "", line) for pair in lines for line in pair if line and ".cu" in line]
    summary = next((line for line in text.splitlines() if "SUMMARY" in line or "runtime error" in line), text[-500:])
    message = cuda.relative(f"{summary.strip()}; {'; '.join(dict.fromkeys(where[:6]))}")
    if "ThreadSanitizer" in text:
        raise errors.SharedMemoryRace(message)
    if "misaligned address" in text:
        raise errors.Misaligned(message)
    if "AddressSanitizer" in text or "out of bounds" in text:
        shared = "global variable" in text or "emulation::poison" in text or "out of bounds" in text
        raise (errors.SharedMemoryError if shared else errors.OutOfBounds)(message)
    raise errors.EmulationError(message + text[-2000:])
