"""What GPUs can do at most, by NVIDIA's own figures; ceilings computed from them are predictions, not measurements."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from fastres.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """``bandwidth``: bytes a second of its memory. ``flops``: dense 16-bit products with float32 sums a second, on tensor
    cores. ``source``: the document both figures are from."""

    key: str
    name: str
    bandwidth: float
    flops: float
    source: str

    def ceiling(self, bytes_per_image: float) -> float:
        """Images a second if only memory limited them."""
        return self.bandwidth / bytes_per_image

    def compute_ceiling(self, flops_per_image: float) -> float:
        """Images a second if only the tensor cores limited them."""
        return self.flops / flops_per_image


def _gpu(key: str, name: str, gigabytes: float, teraflops: float, source: str) -> Gpu:
    return Gpu(key, name, gigabytes * 1e9, teraflops * 1e12, f"NVIDIA {source}")


# Where a data sheet gives only the rate with sparsity, half of it. GeForce: the rate with float32 accumulation.
_ALL = (
    _gpu("v100", "V100 SXM2", 900, 125, "V100 Tensor Core GPU datasheet"),
    _gpu("a100-40", "A100 40GB SXM", 1555, 312, "A100 Tensor Core GPU datasheet"),
    _gpu("a100", "A100 80GB SXM", 2039, 312, "A100 Tensor Core GPU datasheet"),
    _gpu("h100", "H100 SXM", 3350, 989.5, "H100 Tensor Core GPU datasheet"),
    _gpu("h100-pcie", "H100 PCIe", 2000, 756.5, "H100 Tensor Core GPU datasheet"),
    _gpu("h200", "H200 SXM", 4800, 989.5, "H200 Tensor Core GPU datasheet"),
    _gpu("b200", "B200", 8000, 2250, "DGX B200 datasheet"),
    _gpu("l4", "L4", 300, 121, "L4 Tensor Core GPU datasheet"),
    _gpu("l40s", "L40S", 864, 362, "L40S GPU datasheet"),
    _gpu("rtx3090", "GeForce RTX 3090", 936, 71, "Ampere GA102 GPU Architecture whitepaper"),
    _gpu("rtx4090", "GeForce RTX 4090", 1008, 165.2, "Ada GPU Architecture whitepaper"),
    _gpu("rtx5090", "GeForce RTX 5090", 1792, 209.5, "RTX Blackwell GPU Architecture whitepaper"),
)
GPUS: dict[str, Gpu] = {gpu.key: gpu for gpu in _ALL}
_OTHER_NAMES = {"a100-80": "a100", "h100-sxm": "h100", "h200-sxm": "h200", "a100-80gb": "a100", "a100-40gb": "a100-40"}


def find(name: str) -> Gpu:
    """The GPU of that name; case, blanks and underscores don't matter.

    Raises:
        InputError: unknown; the message lists what is known.
    """
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    key = _OTHER_NAMES.get(key, key)
    for candidate in (key, key.replace("-", "")):
        if candidate in GPUS:
            return GPUS[candidate]
    close = difflib.get_close_matches(key, GPUS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(f"unknown GPU {name!r}, known are {', '.join(GPUS)}{hint}")
