"""Drives CMake, which defines the build. Never imports torch: its folder is enough.

FASTRES_NATIVE  AUTO (default): build the native library, or say in one line why not and install pure Python;
                ON: fail instead; OFF: don't.
FASTRES_CUDA    AUTO (default): build the CUDA library where nvcc is found; ON: fail without nvcc; OFF: don't.
FASTRES_CUDA_ARCHS  the GPU architectures that it is for, as CMake names them ("80", "90-real 100-real"); empty (default): all.
CMAKE_ARGS      more arguments for CMake.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from fastres_build import find_torch, new_enough, torch_version  # noqa: E402


class BuildProblem(Exception):
    """Why the native library can't be built, in one line."""


def choice(name: str) -> str:
    value = os.environ.get(name, "AUTO").upper()
    if value not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"fastres: {name}={value} is not one of AUTO, ON, OFF")
    return value


def tool(name: str) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise BuildProblem(f"{name} not found (it is a build requirement: pip install {name})")
    return found


def compiler() -> None:
    wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, wanted)):
        raise BuildProblem(f"no C++ compiler found (looked for {', '.join(wanted)})")


def run(command: list[str], what: str) -> None:
    """Runs a command with its output shown. When it fails, the problem says why in one line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        paragraph = re.search(r"CMake Error[^\n]*:\n\s*((?:  [^\n]+\n)+)", done.stdout)
        line = re.search(r"[^\n]*\b(?:error|undefined reference)\b[^\n]*", done.stdout, re.IGNORECASE)
        text = paragraph.group(1) if paragraph else line.group() if line else f"exit status {done.returncode}"
        raise BuildProblem(f"{what} failed: {' '.join(text.split())}")


def forget_configuration(build: Path) -> None:
    """What ``cmake --fresh`` does, without deleting objects: ninja compiles what has changed.

    An isolated build's cmake and ninja live in a folder that is gone the next time, and a compiler may be another one.
    """
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for folder in (build / "CMakeFiles").glob("[0-9]*"):
        shutil.rmtree(folder)


class CMakeBuild(build_ext):
    def run(self) -> None:
        package = ROOT / "fastres" if self.inplace or self.editable_mode else Path(self.build_lib, "fastres").resolve()
        package.mkdir(parents=True, exist_ok=True)
        for old in [*package.glob("_native.*so"), *package.glob("_cuda.so")]:
            old.unlink()
        facts: dict[str, object] = {"native_error": None, "cuda_error": None}
        cuda = choice("FASTRES_CUDA")
        try:
            self.build(package, cuda)
        except BuildProblem as problem:
            facts["native_error"] = str(problem)
            if cuda == "AUTO":  # a broken CUDA compiler must not cost the CPU library
                try:
                    self.build(package, "OFF")
                    facts.update(native_error=None, cuda_error=str(problem))
                except BuildProblem as second:
                    facts["native_error"] = str(second)
        if facts["native_error"] and (choice("FASTRES_NATIVE") == "ON" or cuda == "ON"):
            raise SystemExit(f"fastres: {facts['native_error']}")
        self.built = [
            str(p) for p in [*package.glob("_native.*so"), *package.glob("_cuda.so"), package / "_build.json"]
        ]
        if facts["native_error"]:
            facts["cuda_error"] = facts["native_error"]
            print(
                f"fastres: installing without the native library: {facts['native_error']}", file=sys.stderr, flush=True
            )
        elif (package / "_cuda.so").exists():
            facts["cuda"] = json.loads((self.build_folder() / "cuda.json").read_text())
        elif not facts["cuda_error"]:
            facts["cuda_error"] = (
                "switched off (FASTRES_CUDA=OFF)" if cuda == "OFF" else "no CUDA compiler (nvcc) was found"
            )
        (package / "_build.json").write_text(json.dumps(facts) + "\n")

    def build_folder(self) -> Path:
        """Kept in the checkout, where setuptools' own is a temporary one for editable installs, and one for all versions of
        Python: most of what is compiled depends on none."""
        return ROOT / "build" / ("editable" if self.inplace or self.editable_mode else "wheel")

    def build(self, package: Path, cuda: str) -> None:
        compiler()
        torch = find_torch()
        if torch is None:
            raise BuildProblem("torch was not found in the environment (pip install 'torch>=2.13')")
        if not new_enough(torch):
            raise BuildProblem(f"torch {torch_version(torch)} is too old, 2.13 or newer is needed")
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").exists():
            raise BuildProblem(f"Python.h not found in {python_include} (install Python's development files)")
        try:
            import pybind11
        except ImportError:
            raise BuildProblem("pybind11 not found (it is a build requirement: pip install pybind11)") from None
        ninja, cmake, build = tool("ninja"), tool("cmake"), self.build_folder()
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_INSTALL_PREFIX": package,
            "FASTRES_TORCH_DIR": torch,
            "FASTRES_TORCH_VERSION": torch_version(torch),
            "FASTRES_PYTHON_INCLUDE": python_include,
            "FASTRES_PYBIND11_INCLUDE": pybind11.get_include(),
            "FASTRES_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FASTRES_VERSION": self.distribution.get_version(),
            "FASTRES_CUDA": cuda,
        }
        if archs := os.environ.get("FASTRES_CUDA_ARCHS", "").replace(";", " ").split():
            settings["CMAKE_CUDA_ARCHITECTURES"] = ";".join(archs)
        forget_configuration(build)
        arguments = [f"-D{k}={v}" for k, v in settings.items()] + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *arguments], "configuring")
        run([cmake, "--build", str(build)], "compiling")
        run([cmake, "--install", str(build)], "installing")

    def get_outputs(self) -> list[str]:
        return getattr(self, "built", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


native = [] if choice("FASTRES_NATIVE") == "OFF" else [Extension("fastres._native", sources=[])]
setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})
