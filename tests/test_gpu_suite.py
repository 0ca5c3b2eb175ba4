"""The tests that need a GPU, without one: when they are selected, that their own code works, and what make gpu runs."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_gpu  # noqa: E402


class Item:
    def __init__(self, gpu):
        self.gpu, self.added = gpu, []

    def get_closest_marker(self, name):
        return name == "gpu" and self.gpu

    def add_marker(self, marker):
        self.added.append(marker.name)


def selected(markexpr, items):
    deselected = []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    config = SimpleNamespace(option=SimpleNamespace(markexpr=markexpr), hook=hook)
    conftest.pytest_collection_modifyitems(config, items)
    return deselected


def test_they_are_not_selected_without_a_device(monkeypatch):
    monkeypatch.delenv("FASTRES_GPU_TESTS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    items = [plain, gpu] = [Item(False), Item(True)]
    assert selected("", items) == [gpu] and items == [plain]
    items = [plain, gpu]
    assert not selected("gpu", items) and gpu.added == ["skip"] and not plain.added and len(items) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    items = [Item(False), Item(True)]
    assert not selected("", items) and len(items) == 2 and not any(i.added for i in items)


def test_their_own_code_works(monkeypatch):
    """Some of each, on the CPU with the library's operators in the place of a device's."""
    monkeypatch.setenv("FASTRES_GPU_TESTS", "cpu")
    some = "network or bits or matrix or empty or points or pools or (test_conv and 17x5x3) or (gradients and 2x17)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/gpu", "-k", some]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_make_gpu_runs(monkeypatch, capsys):
    assert [name for name, _ in check_gpu.commands(None)] == ["parity and behaviour"]
    steps = check_gpu.commands("/bin/compute-sanitizer", ["-x"])
    assert [name for name, _ in steps] == ["parity and behaviour", "memcheck", "racecheck", "synccheck"]
    assert steps[0][1][-1] == "-x" and steps[1][1][:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]
    assert check_gpu.environment("memcheck", {})["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in check_gpu.environment("parity and behaviour", {})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran without a GPU"))
    assert check_gpu.main([]) == 0 and "nothing was run" in capsys.readouterr().out

    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_gpu.shutil, "which", lambda name: "/bin/compute-sanitizer")
    monkeypatch.setattr(subprocess, "run", lambda c, **k: SimpleNamespace(returncode=ran.append(c) or "racecheck" in c))
    assert check_gpu.main([]) == 1 and len(ran) == 4 and "FAILED: racecheck" in capsys.readouterr().out


def test_the_sanitized_tests_exist():
    """The expression selects tests of the cuda backend only, some of each file."""
    code = "import torch, sys, pytest\ntorch.cuda.is_available = lambda: True\n"
    code += "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', 'tests/gpu', '-k', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", code, check_gpu.SANITIZED], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert 8 <= len(names) <= 40, done.stdout[-2000:]
    assert all("cuda" in name.split("[")[1] and "triton" not in name for name in names)
    for test in ("test_conv_stats", "test_conv_act", "test_gradients", "test_points", "test_the_same_bits_twice"):
        assert any(test in name for name in names), test
