"""How exactly float32 products are computed."""

import torch


def tf32_allowed(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` may be TF32: float32 only, and where torch allows it for convolutions."""
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
