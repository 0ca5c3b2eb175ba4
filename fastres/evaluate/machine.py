"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import fastres
from fastres._cpu import cpu_name


def machine() -> dict[str, Any]:
    """Processor, GPU, threads, versions and build, in values that JSON can hold."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "fastres": fastres.build_info(),
    }  # fmt: skip
