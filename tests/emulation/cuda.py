"""The project's CUDA kernels, run without a GPU: as C++ (fibers), as the PTX that nvcc emits, and under sanitizers.

An op's test needs a .cpp that includes the kernels and has C functions that launch them (see scale_shift_act.cpp), a
mirror of its problem (cuda_problems.py), and this:

    library = cuda.build("conv.cpp")                       # of tests/emulation; compiled once, kept under build/emulation
    text = cuda.ptx("conv.cu")                             # for sm_80, kept likewise
    cuda_problems.check(library, "conv_forward_size", ConvForward)

    @pytest.mark.parametrize("executor", [*cuda.fibers(), cuda.Ptx(text)], ids=str)
    def test_forward(executor):
        x, w, y = (...)                                    # CPU tensors; y filled with NaN
        problem = ConvForward(type=..., x=x.data_ptr(), weight=w.data_ptr(), y=y.data_ptr(), ...)
        library.run("conv_forward", problem, executor, {"x": x, "w": w, "y": y})
        assert_parity(y, expected, truth)

Numbers that the host code knows: ``library.call("workspace_size", problem)``. Whatever a kernel does wrong is an
EmulationError (errors.py) that names the kernel, the thread and the line.
"""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from emulation import errors
from emulation.memory import GuardedMemory
from emulation.ptx import run_ptx

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulation"
RUNTIME = HERE / "device" / "runtime.cpp"
# No equal functions made one (a recorded launch needs its kernel's own name), no variables shared between libraries.
COMMON = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-gnu-unique",
    "-fno-ipa-icf",
    f"-I{ROOT}",
    f"-I{HERE}",
)
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Checks of the compiler whose reports device/checks.cpp turns into errors.
CHECKS = (
    "-fsanitize=alignment,bounds-strict,signed-integer-overflow,shift,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)
ORDERS = ("forward", "reversed", "random", "starving")
LANDINGS = ("early", "late", "random")
Tensors = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]


class Executor(Protocol):
    def execute(
        self, library: "Library", function: str, problem: ctypes.Structure, tensors: Mapping[str, Any]
    ) -> None: ...


class _Settings(ctypes.Structure):
    _fields_ = [("record", ctypes.c_int), ("order", ctypes.c_int), ("landing", ctypes.c_int), ("seed", ctypes.c_uint64)]


class _Record(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64),
        ("bytes_size", ctypes.c_uint64),
        ("bytes", ctypes.c_void_p),
        ("places", ctypes.POINTER(ctypes.c_size_t)),
        ("cooperative", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Recorded:
    """A launch that host code made. ``values``: the parameters' bytes."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    values: tuple[bytes, ...]
    cooperative: bool


class Library:
    """Host code and kernels, compiled by g++. ``source``: the .cpp, which Sanitized compiles once more."""

    def __init__(self, path: Path, source: Path, flags: tuple[str, ...]) -> None:
        self.path, self.source, self.flags = path, source, flags
        self.functions = ctypes.CDLL(str(path))
        self._run = self.functions.emulation_run
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_Settings)]

    def run(self, function: str, problem: ctypes.Structure, executor: Executor, tensors: Tensors) -> None:
        """Calls ``function(&problem)``. ``tensors``: all memory that its kernels may touch, on the CPU."""
        named = tensors if isinstance(tensors, Mapping) else {str(n): t for n, t in enumerate(tensors)}
        executor.execute(self, function, problem, named)

    def call(self, function: str, *arguments: Any, result: Any = ctypes.c_int64) -> Any:
        """A plain C function: structures and tensors are passed by their address."""
        found = getattr(self.functions, function)
        found.restype = result
        return found(*map(_argument, arguments))

    def record(self, function: str, problem: ctypes.Structure) -> list[Recorded]:
        """The launches that the function makes; nothing runs."""
        self.start(function, problem, _Settings(record=1))
        found, record = [], _Record()
        for number in range(self.functions.emulation_launches()):
            self.functions.emulation_launch(number, ctypes.byref(record))
            whole = ctypes.string_at(record.bytes, record.bytes_size)
            places = record.places[: 2 * record.parameters]
            found.append(
                Recorded(
                    record.name.decode(),
                    tuple(record.grid),
                    tuple(record.block),
                    record.shared_bytes,
                    tuple(whole[a : a + n] for a, n in zip(places[::2], places[1::2], strict=True)),
                    bool(record.cooperative),
                )
            )
        return found

    def start(self, function: str, problem: ctypes.Structure, settings: _Settings) -> None:
        address = ctypes.cast(getattr(self.functions, function), ctypes.c_void_p)
        error = self._run(address, ctypes.addressof(problem), ctypes.byref(settings))
        if error is not None:
            raise_error(error.decode())


def relative(text: str) -> str:
    """Paths in the repository are shown from its root."""
    return re.sub(
        r"/[^\s:()]+(?=:\d)",
        lambda m: os.path.relpath(m[0], ROOT) if os.path.normpath(m[0]).startswith(f"{ROOT}/") else m[0],
        text,
    )


def _argument(value: Any) -> Any:
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else value


def raise_error(text: str) -> None:
    kind, _, message = text.partition(": ")
    message = relative(message)
    raise getattr(errors, kind, errors.EmulationError)(message)


@dataclass(frozen=True)
class Fibers:
    """Every thread is a fiber. The seed decides about the order in which threads run, and when asynchronous copies land
    (as early or as late as they may), where these aren't named. ``starving``: a warp waits while any other can go on."""

    seed: int = 0
    order: str = ""
    landing: str = ""

    def execute(self, library: Library, function: str, problem: ctypes.Structure, tensors: Mapping[str, Any]) -> None:
        library.start(function, problem, self.settings())

    def settings(self) -> _Settings:
        order = ORDERS.index(self.order) if self.order else self.seed % 4
        landing = (
            LANDINGS.index(self.landing)
            if self.landing
            else (1, 0, 2, 0)[self.seed % 4]
            if self.seed < 4
            else self.seed % 3
        )
        return _Settings(0, order, landing, self.seed)

    def __str__(self) -> str:
        return "-".join(str(part) for part in ("fibers", self.seed, self.order, self.landing) if part != "")


def fibers() -> tuple[Fibers, ...]:
    """The schedules that a kernel has to survive: in order with late copies, reversed, random, and one warp starved."""
    return tuple(Fibers(seed) for seed in range(4))


@dataclass(frozen=True)
class Ptx:
    """The launches that the host code makes, with the kernels' PTX (for sm_80) in the PTX interpreter.

    ``change``: what to do to the text first, to plant an error. ``early``: asynchronous copies land at once.
    """

    text: str
    change: Callable[[str], str] | None = None
    race_check: bool = True
    early: bool = False

    def execute(self, library: Library, function: str, problem: ctypes.Structure, tensors: Mapping[str, Any]) -> None:
        text = self.text if self.change is None else self.change(self.text)
        for launch in library.record(function, problem):
            if launch.block[1:] != (1, 1):
                raise errors.Unsupported(f"{launch.name}: the PTX interpreter runs blocks of one dimension")
            memory = GuardedMemory(tensors)
            try:
                run_ptx(
                    text, memory, launch.grid, launch.block[0], launch.shared, list(launch.values), self.race_check,
                    self.early, launch.name, launch.cooperative,
                )  # fmt: skip
            except errors.EmulationError as error:
                raise type(error)(f"{launch.name}: {error}") from error

    def __str__(self) -> str:
        return "ptx"


def build(source: str | Path, flags: Iterable[str] = ()) -> Library:
    """Compiles a .cpp of tests/emulation (or any path) with the runtime; no compiler is an error."""
    source, flags = HERE / source, tuple(flags)
    runtime = compiled((*COMMON, *WARNINGS, "-fvisibility=hidden", "-c"), RUNTIME, ".o")
    kernels = compiled((*COMMON, *WARNINGS, *CHECKS, *flags, "-c"), source, ".o")
    return _loaded(linked(("-shared", "-ldl"), [kernels, runtime], source.stem, ".so"), source, flags)


@functools.cache
def _loaded(path: Path, source: Path, flags: tuple[str, ...]) -> Library:
    return Library(path, source, flags)


@functools.cache
def ptx(source: str | Path, flags: tuple[str, ...] = ()) -> str:
    """The PTX for sm_80 that nvcc makes of a .cu of tests/emulation (or any path)."""
    options = ("-ptx", "-arch=sm_80", "-lineinfo", "-std=c++20", f"-I{ROOT}", f"-I{HERE}", *flags)
    return compiled(options, HERE / source, ".ptx", compiler="nvcc").read_text()


@functools.cache
def ptx_of_library(path: Path = ROOT / "fastres" / "_cuda.so", arch: str = "sm_80") -> str | None:
    """The PTX for ``arch`` inside a compiled library, or None if it has only machine code for it."""
    from benchmarks.cubin import tools

    command = [str(tools() / "cuobjdump"), "--dump-ptx", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.findall(r"^\.version.*?(?=^Fatbin|^=====|\Z)", text, re.S | re.M)
    return "\n".join(part for part in parts if f".target {arch}\n" in part) or None


# ---- Compiling: kept by the contents of everything that goes in -------------------------------------------------------


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def compiled(options: tuple[str, ...], source: Path, suffix: str, compiler: str = "g++") -> Path:
    """What the compiler makes of a source. What it included is noted beside, so that a change is seen without a run."""
    BUILD.mkdir(parents=True, exist_ok=True)
    first = _digest([_version(compiler), *options, str(source)])
    note = BUILD / f"{source.stem}-{first[:16]}.d"
    if note.exists() and (kept := _kept(note, source, first, suffix)).exists():
        return kept
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        out, depends = Path(folder) / f"out{suffix}", Path(folder) / "out.d"
        command = [compiler, *options, str(source), "-o", str(out), "-MMD", "-MF", str(depends)]
        _checked(command)
        os.replace(depends, note)
        kept = _kept(note, source, first, suffix)
        os.replace(out, kept)
    return kept


def _kept(note: Path, source: Path, first: str, suffix: str) -> Path:
    names = note.read_text().replace("\\\n", " ").partition(":")[2].split()
    contents = [
        Path(name).read_bytes() if Path(name).exists() else b"" for name in sorted(set(names)) if "/usr/" not in name
    ]
    return BUILD / f"{source.stem}-{_digest([first, *contents])[:32]}{suffix}"


def linked(options: tuple[str, ...], objects: list[Path], stem: str, suffix: str) -> Path:
    kept = BUILD / f"{stem}-{_digest([*options, *(o.name for o in objects)])[:32]}{suffix}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            out = Path(folder) / kept.name
            _checked(["g++", *map(str, objects), *options, "-o", str(out)])
            os.replace(out, kept)
    return kept


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-5000:]}")


def _digest(parts: Iterable[str | bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(str(len(data)).encode() + b":" + data)
    return found.hexdigest()
