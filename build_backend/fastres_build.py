"""PEP 517 backend: setuptools' own, plus torch as a build requirement only where no torch can be found.

The native library needs torch's headers to build, and LibTorch's stable ABI makes any torch from 2.13 right for that,
whichever torch it later runs with. So an isolated build uses the torch of the environment that it builds for, which
isolation hides from `import` but not from a fresh interpreter. Naming torch in pyproject.toml instead would download a
second one into every build.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta as _setuptools

TORCH_MINIMUM = (2, 13)

build_sdist = _setuptools.build_sdist
build_wheel = _setuptools.build_wheel
build_editable = _setuptools.build_editable
get_requires_for_build_sdist = _setuptools.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = _setuptools.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _setuptools.prepare_metadata_for_build_editable


def torch_version(folder: Path) -> str:
    """The version in torch/version.py of this torch folder, read as text (importing torch takes seconds)."""
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (folder / "version.py").read_text())
    return match.group(1) if match else "0"


def new_enough(folder: Path) -> bool:
    """Whether this torch has the stable ABI that the native library is written for."""
    return tuple(int(n) for n in re.findall(r"\d+", torch_version(folder))[:2]) >= TORCH_MINIMUM


def find_torch() -> Path | None:
    """The folder of torch: on this interpreter's path, or in the environment that an isolated build hides, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    interpreters = [sys.executable]
    # Front ends that build with an interpreter of their own keep this variable.
    if environment := os.environ.get("VIRTUAL_ENV"):
        interpreters.append(str(Path(environment, "bin", "python")))
    question = (
        "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    )
    for interpreter in interpreters:
        try:
            # -I: without PYTHONPATH, which is how isolation is done.
            answer = subprocess.run(
                [interpreter, "-I", "-c", question], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            continue
        if answer:
            return Path(answer)
    return None


def _torch_requirement() -> list[str]:
    if os.environ.get("FASTRES_NATIVE", "AUTO").upper() == "OFF":
        return []
    folder = find_torch()
    return [] if folder is not None and new_enough(folder) else [f"torch>={TORCH_MINIMUM[0]}.{TORCH_MINIMUM[1]}"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What `pip wheel .` must install first."""
    return _setuptools.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What `pip install -e .` must install first."""
    return _setuptools.get_requires_for_build_editable(config_settings) + _torch_requirement()
