"""Show what was built and what is found here, and compare every op on every backend with float64, on the CPU and on a GPU.
Exit code 1 means that a comparison failed: don't trust results of this machine, and report the table."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli.options import console

if TYPE_CHECKING:
    from rich.table import Table

    from fastres.evaluate.parity import Parity

NO_GPU = (
    "No GPU was compared: the kernels of triton and cuda need one that torch sees. There, fastres doctor prints the same table "
    "for it, and in a checkout of the project make gpu runs the whole suite and compute-sanitizer."
)
PACKAGES = (
    # what is imported, what is installed, what for
    ("torch", ("torch",), "tensors"),
    ("numpy", ("numpy",), "data"),
    ("jsonargparse", ("jsonargparse",), "command line"),
    ("rich", ("rich",), "progress and tables"),
    ("tensorboard", ("tensorboard",), "logs"),
    ("matplotlib", ("matplotlib",), "plot"),
    ("sklearn", ("scikit-learn",), "digits"),
    ("torchvision", ("torchvision",), "folders of images, pretrained weights"),
    ("nvidia.dali", tuple(f"nvidia-dali-cuda{n}" for n in (130, 120, 110)), "folders of images, faster"),
    ("triton", ("triton",), "the triton backend, torch.compile on a GPU"),
    ("timm", ("timm",), "networks to fuse"),
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--threads", type=PositiveInt, default=None, help="CPU threads for computing (torch's choice)")


def run(options: Namespace) -> int:
    """Print the tables; returns 1 if an op disagrees."""
    import torch
    from rich.table import Table

    import fastres
    from fastres import backends
    from fastres._cpu import cpu_name
    from fastres.evaluate.parity import op_parity

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    screen = console()
    machine = Table("machine", "", title="what is here", show_header=False)
    machine.add_row("processor", f"{cpu_name()}, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(index) for index in range(count)]
    machine.add_row("GPU", ", ".join(gpus) or "none that torch finds")
    machine.add_row("CUDA compiler", nvcc_version())
    for name, value in fastres.build_info().items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        machine.add_row(f"build: {name}", shown)
    screen.print(machine)

    libraries = Table("library", "version", "for", title="libraries")
    for module, names, purpose in PACKAGES:
        libraries.add_row(module, package_version(module, names), purpose)
    screen.print(libraries)

    usable = Table("backend", "usable", "remark", title="backends")
    for name, available, reason in backends.status():
        usable.add_row(name, "yes" if available else "no", reason or "")
    screen.print(usable)

    rows = [row for device in (["cpu", "cuda"] if gpus else ["cpu"]) for row in op_parity(device)]
    screen.print(parity_table(rows))
    failures = sum(row.failed for row in rows)
    compared = sum(row.reason is None for row in rows)
    screen.print(f"{compared} comparisons, {failures} failed", highlight=False)
    if not gpus:
        screen.print(NO_GPU, highlight=False, markup=False)
    return 1 if failures else 0


def parity_table(rows: Sequence[Parity]) -> Table:
    """The matrix, a row an op, backend and dtype."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="parity with float64, forward and backward")
    for title in ("op", "backend", "device", "dtype", "error", "allowed", "result"):
        table.add_column(title)
    for row in rows:
        place = (row.what, row.backend, row.device, row.dtype)
        if row.reason is not None:
            table.add_row(*place, "", "", Text(f"not run: {row.reason}"), style="dim")
        elif row.raised is not None:
            table.add_row(*place, "", "", Text(f"FAILED: {row.raised}", style="bold red"))
        else:
            result = Text("FAILED", style="bold red") if row.failed else Text("ok")
            table.add_row(*place, f"{row.error:.1e}", f"{row.allowed:.1e}", result)
    return table


def package_version(module: str, names: tuple[str, ...]) -> str:
    """The installed version, or that there is none."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        found = False
    return "of unknown version" if found else "not installed"


def nvcc_version() -> str:
    """The CUDA compiler on the path, and its version."""
    path = shutil.which("nvcc")
    if path is None:
        return "no nvcc on the path"
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    release = next((line.strip() for line in output.splitlines() if "release" in line), "unknown version")
    return f"{path}: {release}"
