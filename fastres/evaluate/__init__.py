"""Measuring trained networks."""

from __future__ import annotations

from fastres.evaluate.single_crop import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
