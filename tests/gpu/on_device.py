"""Where the GPU tests run. FASTRES_GPU_TESTS=cpu tries the tests' own code without a device, on the CPU's backends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import _lacks
from torch import Tensor

from fastres import backends, device_tuner, tuning

DEVICE = os.environ.get("FASTRES_GPU_TESTS", "cuda")
BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("library",)
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def require_backend(op: str, backend: str, dtype: torch.dtype) -> None:
    """Skips what the backend doesn't have or the device can't run; under FASTRES_CI=1 (make gpu) that is a failure."""
    reason = backends.refusal(backend, op, DEVICE, dtype)
    if reason == f"{backend} has no {op}":
        pytest.skip(reason)
    if reason is not None:
        _lacks(reason)


def moved(t: Tensor | None) -> Tensor | None:
    """``t`` on the device in the very layout it has, with whatever lies around it in memory."""
    if t is None or not t.numel():
        return None if t is None else t.to(DEVICE)
    whole = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return torch.as_strided(whole.to(DEVICE, copy=True), t.shape, t.stride(), t.storage_offset())


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """float32 products exact, or for "tf32" as TF32."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN: results and workspaces that a kernel leaves out show. What a test asks of no backend, the library
    does, whatever this machine measured before."""
    monkeypatch.setenv(device_tuner.VARIABLE, "OFF")
    monkeypatch.setenv(tuning.VARIABLE, "OFF")
    tuning.forget()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    tuning.forget()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
