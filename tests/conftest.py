"""What every test gets: two threads, a seed, and ``require`` for packages that not every machine has."""

import os

# Threads that spin while they wait slow everything down where other programs run too; read when torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import importlib
import random
import shutil
import subprocess
import sys
from types import ModuleType
from typing import NoReturn

import pytest
import torch

torch.set_num_threads(2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the marker "gpu" run where torch sees a GPU, and elsewhere not: with -m gpu they are skipped.
    (FASTRES_GPU_TESTS=cpu tries their own code.)"""
    if torch.cuda.is_available() or os.environ.get("FASTRES_GPU_TESTS") == "cpu":
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" in (config.option.markexpr or ""):
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
    elif gpu:
        items[:] = [item for item in items if item not in set(gpu)]
        config.hook.pytest_deselected(items=gpu)


def require(name: str) -> ModuleType:
    """Import an optional package; without it skip the test, or fail if FASTRES_CI=1 says that nothing may lack."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        _lacks(f"{name} can't be imported: {error}")


def require_program(name: str) -> str:
    """The path of a program; without it skip or fail, as in :func:`require`."""
    return shutil.which(name) or _lacks(f"there is no {name} on the path")


def _lacks(message: str) -> NoReturn:
    if os.environ.get("FASTRES_CI") == "1":
        pytest.fail(f"{message} (FASTRES_CI=1 asks for every test)", pytrace=False)
    pytest.skip(message)


def run_with_isa(isa: str, code: str, **environment: str) -> None:
    """Run Python code, which may import test modules, with an instruction set forced; fails as the code fails."""
    code = f"import fastres\nassert fastres.build_info()['isa'] == {isa!r}\n{code}"
    run_python(code, FASTRES_ISA=isa, **environment)


def run_python(code: str, **environment: str) -> None:
    """Run Python code, which may import test modules, in a process of its own; fails as the code fails."""
    env = {**os.environ, **environment}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rerun_with_isa(isa: str, file: str, selection: str) -> None:
    """Run tests of a file with an instruction set forced."""
    if os.environ.get("FASTRES_ISA"):
        pytest.skip("already inside such a run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selection]
    done = subprocess.run(command, env={**os.environ, "FASTRES_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(autouse=True)
def _seeds():
    """The same random numbers in every order of the tests; settings that a test may have changed are put back."""
    torch.manual_seed(0)
    random.seed(0)
    yield
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
