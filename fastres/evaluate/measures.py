"""What an evaluation counts: sums over images that add up exactly, whatever the batches and the ranks were."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres.errors import InputError, UserError

BINS = 15  # of confidence, as Guo et al. 2017 (arXiv 1706.04599) and torchmetrics use


@dataclass(frozen=True)
class ClassRow:
    """One class: shares of 1; ``support`` images have this label. A share of nothing is None."""

    name: str
    support: int
    predicted: int
    top1: float | None
    top5: float | None
    precision: float | None


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies in ``(low, high]``: their mean confidence and accuracy (None where there are none)."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Summary:
    """The figures of an evaluation. Shares are of 1, ``loss`` is the mean negative log-likelihood in nats.

    ``ece`` is the expected calibration error over :data:`BINS` bins of equal width, ``mce`` the largest bin's error.
    ``confusion[label][prediction]`` counts images.
    """

    samples: int
    top1: float
    top5: float
    loss: float
    ece: float
    mce: float
    classes: list[ClassRow] = field(repr=False)
    calibration: list[Bin] = field(repr=False)
    confusion: list[list[int]] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Measures:
    """Adds up predictions. It keeps counts and no scores: they merge exactly over ranks, take the same memory for any
    number of images, and the bins are what a reliability diagram draws.

    Args:
        num_classes: K, the number of outputs.
        device: where the sums live; reading them is left to :meth:`summary`, so that a GPU isn't waited for.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self._top5 = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._bin_counts = torch.zeros(2, BINS, dtype=torch.int64, device=device)  # images, correct
        self._sums = torch.zeros(1 + BINS, dtype=torch.float64, device=device)  # loss, confidence by bin

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            log_probabilities: ``[B, K]`` float, on the device of the sums.
            labels: ``[B]`` int64 in 0..K-1.

        Raises:
            InputError: shapes that don't fit.
        """
        k = self.num_classes
        if log_probabilities.shape != (len(labels), k):
            raise InputError(
                f"expected scores [{len(labels)}, {k}] for {len(labels)} labels and {k} classes, "
                f"got {list(log_probabilities.shape)}"
            )
        scores = log_probabilities.double()
        ranked = scores.topk(min(5, k), 1)
        predicted, correct = ranked.indices[:, 0], ranked.indices[:, 0] == labels
        self._confusion += torch.bincount(labels * k + predicted, minlength=k * k).view(k, k)
        self._top5 += torch.bincount(labels[(ranked.indices == labels[:, None]).any(1)], minlength=k)
        confidence = ranked.values[:, 0].exp().clamp(max=1.0)
        # Closed on the right as in the paper; a confidence of exactly 0 belongs to the first bin.
        bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        self._bin_counts[0] += torch.bincount(bins, minlength=BINS)
        self._bin_counts[1] += torch.bincount(bins[correct], minlength=BINS)
        self._sums[0] -= scores.gather(1, labels[:, None]).sum()
        self._sums[1:] += torch.bincount(bins, weights=confidence, minlength=BINS)

    def merge_ranks(self) -> None:
        """Replace the sums by those of all ranks. Every rank must call, also one that counted nothing."""
        import torch.distributed as dist

        for values in (self._confusion, self._top5, self._bin_counts, self._sums):
            dist.all_reduce(values)

    @property
    def samples(self) -> int:
        """Images counted so far."""
        return int(self._confusion.sum())

    def summary(self, names: list[str] | None = None) -> Summary:
        """The figures.

        Args:
            names: of the classes; fewer than K are filled up with numbers.

        Raises:
            UserError: nothing was counted.
        """
        samples, k = self.samples, self.num_classes
        if not samples:
            raise UserError("there is nothing to evaluate: the loader delivered no image")
        given = list(names or [])[:k]
        given += [str(number) for number in range(len(given), k)]
        support, predicted = self._confusion.sum(1).tolist(), self._confusion.sum(0).tolist()
        hits, hits5 = self._confusion.diagonal().tolist(), self._top5.tolist()
        counts, correct = self._bin_counts.tolist()
        loss, *confidences = self._sums.tolist()
        rows = [
            ClassRow(
                name, support[i], predicted[i], _share(hits[i], support[i]), _share(hits5[i], support[i]),
                _share(hits[i], predicted[i]),
            )
            for i, name in enumerate(given)
        ]  # fmt: skip
        bins = [
            Bin(i / BINS, (i + 1) / BINS, n, _share(confidences[i], n), _share(correct[i], n))
            for i, n in enumerate(counts)
        ]
        gaps = [abs(confidences[i] - correct[i]) for i in range(BINS)]
        return Summary(
            samples=samples, top1=sum(hits) / samples, top5=sum(hits5) / samples, loss=loss / samples,
            ece=sum(gaps) / samples, mce=max(gap / n for gap, n in zip(gaps, counts, strict=True) if n),
            classes=rows, calibration=bins, confusion=self._confusion.tolist(),
        )  # fmt: skip


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
