"""Data sets and loaders. :func:`create_loader` is the one way in; see :class:`Loader` for what it returns."""

from __future__ import annotations

from fastres.data.loader import DATASETS, Loader, create_loader

__all__ = ["DATASETS", "Loader", "create_loader"]
