"""Measuring trained networks."""

from __future__ import annotations

from fastres.evaluate.assess import Assessment, assess
from fastres.evaluate.measures import Measures, Summary
from fastres.evaluate.population import population_statistics
from fastres.evaluate.protocols import Protocol, make_protocol
from fastres.evaluate.single_crop import Evaluation, evaluate
from fastres.evaluate.sources import FolderSource, LoaderSource, TensorSource

__all__ = [
    "Assessment",
    "Evaluation",
    "FolderSource",
    "LoaderSource",
    "Measures",
    "Protocol",
    "Summary",
    "TensorSource",
    "assess",
    "evaluate",
    "make_protocol",
    "population_statistics",
]
