"""Checks what a wheel holds, then that it works: ``python tools/check_wheel.py [--run] dist/*.whl``.

``--run`` installs it into a folder of its own, beside the torch of this environment, and computes on the CPU. The checks of
a library are those that tests/test_packaging.py makes of the installed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 60 * 10**6
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Every Linux has these, and torch brings its own two.
NEEDED = {"libtorch_cpu.so", "libc10.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
NEEDED_PREFIXES = ("ld-linux", "libdl.so", "libpthread.so", "librt.so")
# The C functions of LibTorch's stable interface: torch/csrc/stable/c/shim.h, and in torch/csrc/inductor/aoti_torch c/shim.h and
# generated/c_shim_aten.h. A C++ name, which is mangled, begins otherwise.
STABLE = re.compile(r"(aoti_torch|torch)_\w+")
PYTHON = re.compile(r"_?Py[A-Z_]\w+")
# Folders of whoever built it. Two characters at the end: four bytes of machine code may well read "/tmp".
PRIVATE = re.compile(rb"/(?:home|root|Users|work|opt|mnt|tmp|build|builds|project|usr/local)/[\w.+-]{2,}[\w./+-]*")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbol_problems(library: Path) -> list[str]:
    """What a library asks of others but may not, and what it shows but should not.

    It may ask for functions of torch's stable C interface, for Python's if it is a module, and for versioned names, which
    are those of the C and C++ libraries. A C++ name without a version would come from torch, also one of ``std``: torch's
    wheels export some.
    """
    module = library.name.startswith("_native")
    asked = re.findall(r"^\s+U (\S+)$", output("nm", "-D", "--undefined-only", str(library)), re.M)
    names = [name for name in asked if "@" not in name]
    found = [
        f"{library.name} needs {name}, which is no part of torch's stable C interface"
        for name in names
        if not STABLE.fullmatch(name) and not (module and PYTHON.fullmatch(name))
    ]
    if not any(map(STABLE.fullmatch, names)):
        found.append(f"{library.name} uses nothing of torch")
    shown = output("nm", "-DC", "--defined-only", str(library))
    if re.search(r"\bfastres::", shown):
        found.append(
            f"{library.name} exports functions of fastres: another library's of the same name would be taken for them"
        )
    return found


def link_problems(library: Path) -> list[str]:
    """Libraries that a user may not have, and folders of the builder where they would be looked for."""
    dynamic = output("readelf", "-d", str(library))
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    found = [
        f"{library.name} needs the library {name}"
        for name in needed
        if name not in NEEDED and not name.startswith(NEEDED_PREFIXES)
    ]
    folders = re.findall(r"(?:RUNPATH|RPATH).*\[(.+?)\]", dynamic)
    if folders != ["$ORIGIN/../torch/lib"]:
        found.append(f"{library.name} looks for libraries in {folders}, not beside the package")
    return found


def folder_problems(name: str, content: bytes, own: tuple[Path, ...] = ()) -> list[str]:
    """Folders of the machine that a file was made on. ``own``: folders that are known not to belong into it."""
    found = [match.group().decode() for match in PRIVATE.finditer(content)]
    found += [str(folder) for folder in own if str(folder).encode() in content]
    return [f"{name} names the folder {folder}" for folder in dict.fromkeys(found)]


def library_problems(library: Path, own: tuple[Path, ...] = ()) -> list[str]:
    return symbol_problems(library) + link_problems(library) + folder_problems(library.name, library.read_bytes(), own)


def python_files(root: Path = ROOT) -> dict[str, Path]:
    """What a wheel holds of the sources, by its name there. ``fastres/kernels`` is a link to ``kernels``."""
    folders = {"fastres": root / "fastres", "fastres/kernels": root / "kernels"}
    return {
        f"{name}/{file.relative_to(at).as_posix()}": file for name, at in folders.items() for file in at.rglob("*.py")
    }


def wheel_problems(wheel: Path, sources: Path = ROOT) -> list[str]:
    """What is wrong with the contents of a wheel of these sources, built for all architectures."""
    found = []
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"{wheel.name} has {wheel.stat().st_size / 1e6:.1f} MB, {MOST_BYTES / 1e6:.0f} are allowed")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        files = {p.relative_to(folder).as_posix(): p for p in Path(folder).rglob("*") if p.is_file()}
        python, wanted = {name for name in files if name.endswith(".py")}, python_files(sources)
        found += [f"there is no {name}" for name in sorted(wanted.keys() - python)]
        found += [
            f"{name} is not that of the sources"
            for name in sorted(python)
            if name not in wanted or files[name].read_bytes() != wanted[name].read_bytes()
        ]
        for name in ("_native.*.so", "_cuda.so"):
            if sum(Path(file).match(f"fastres/{name}") for file in files) != 1:
                found.append(f"there is not one fastres/{name}")
        if not any(Path(file).match("*.dist-info/licenses/LICENSE") for file in files):
            found.append("there is no licence")
        for name, file in files.items():
            if name.endswith(".so"):
                found += library_problems(file)
            elif name not in python:
                found += folder_problems(name, file.read_bytes())
        notes = json.loads(files["fastres/_build.json"].read_text()) if "fastres/_build.json" in files else {}
        archs = {int(re.sub(r"\D.*", "", arch)) for arch in notes.get("cuda", {}).get("archs", [])}
        if archs != set(ARCHITECTURES):
            found.append(f"built for the architectures {sorted(archs)}, not for {list(ARCHITECTURES)}")
    return found


USE = """
import sys
import torch
import fastres
assert fastres.__file__.startswith(sys.argv[1]), fastres.__file__
info = fastres.build_info()
assert info["native"] and info["cuda"], info
model = fastres.create_model("resnet20", fused=True, num_classes=10)
x = torch.randn(2, 3, 32, 32)
model(x).sum().backward()
with fastres.use_backend("native"):
    assert torch.isfinite(model.eval()(x)).all()
"""


def run(wheel: Path) -> None:
    """Installs the wheel and uses it as without a GPU: both libraries load, a network computes, ``doctor`` is content."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--no-deps", "--target", folder, str(wheel)], check=True)
        environment = {**os.environ, "PYTHONPATH": folder, "CUDA_VISIBLE_DEVICES": ""}
        for command in ([sys.executable, "-c", USE, folder], [sys.executable, "-m", "fastres", "doctor"]):
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{wheel.name} does not work: {done.stdout}{done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--run", action="store_true", help="install it into a temporary folder and use it on the CPU")
    options = parser.parse_args()
    failed = False
    for wheel in options.wheels:
        found = wheel_problems(wheel)
        print(
            "\n".join(found or [f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, nothing wrong with its contents"])
        )
        failed |= bool(found)
        if options.run:
            run(wheel.resolve())
            print(f"{wheel.name}: installed and run on the CPU")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
