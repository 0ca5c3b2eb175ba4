"""An evaluation on the terminal and in files: tables, JSON, CSV, and one HTML page with its figures inside."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.evaluate.assess import Assessment
from fastres.evaluate.measures import Summary
from fastres.evaluate.page import cards, image, page, section, subplots, svg, table

NAMED = 40  # classes; the confusion matrix of more is drawn without names
WORST = 15  # classes and confusions that the terminal shows


def confusions(summary: Summary, most: int = WORST) -> list[tuple[str, str, int, float]]:
    """The most frequent errors: (label, prediction, images, share of the label's images)."""
    names = [row.name for row in summary.classes]
    found = [
        (names[i], names[j], count, count / summary.classes[i].support)
        for i, counts in enumerate(summary.confusion)
        for j, count in enumerate(counts)
        if count and i != j
    ]
    return sorted(found, key=lambda error: -error[2])[:most]


def rich_tables(assessment: Assessment, title: str, network: str) -> list[Any]:
    """What ``fastres eval`` prints: the figures, the weakest classes, the most frequent confusions."""
    from rich.table import Table

    s = assessment.summary
    figures = Table("network", "images", "top-1", "top-5", "loss", "ECE", "views", "images/s", "data wait", title=title)
    figures.add_row(
        network, str(s.samples), f"{s.top1:.2%}", f"{s.top5:.2%}", f"{s.loss:.4f}", f"{s.ece:.4f}",
        f"{assessment.protocol.count} ({assessment.protocol.name})", f"{assessment.images_per_s:,.1f}",
        f"{assessment.data_wait:.1%}",
    )  # fmt: skip
    weakest = sorted((row for row in s.classes if row.support), key=lambda row: row.top1 or 0.0)[:WORST]
    few = "" if len(weakest) == len(s.classes) else f", the weakest {len(weakest)} of {len(s.classes)}"
    classes = Table("class", "images", "top-1", "top-5", "precision", title=f"by class{few}")
    for row in weakest:
        classes.add_row(row.name, str(row.support), percent(row.top1), percent(row.top5), percent(row.precision))
    wrong = Table("label", "taken for", "images", "share of the label", title="most frequent confusions")
    for label, prediction, count, share in confusions(s):
        wrong.add_row(label, prediction, str(count), f"{share:.1%}")
    return [figures, classes, wrong]


def percent(share: float | None) -> str:
    """A share of 1 as text; a share of nothing is a dash."""
    return "–" if share is None else f"{share:.2%}"


def write_json(path: Path, assessment: Assessment, about: dict[str, Any]) -> None:
    """All figures, with the per-class rows, the calibration bins and the confusion matrix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **assessment.as_dict()}, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows of values under their names; None becomes an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def write_files(folder: Path, assessment: Assessment, about: dict[str, Any], title: str) -> list[Path]:
    """Writes ``eval.json``, ``classes.csv``, ``confusion.csv``, ``calibration.csv`` and ``eval.html`` into ``folder``.

    Args:
        about: what was evaluated, as plain values; becomes part of the JSON and a table of the page.

    Raises:
        UserError: matplotlib is missing; the other files are written by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    s = assessment.summary
    names = [row.name for row in s.classes]
    write_json(folder / "eval.json", assessment, about)
    write_csv(
        folder / "classes.csv", ("class", "images", "predicted", "top1", "top5", "precision"),
        [(r.name, r.support, r.predicted, r.top1, r.top5, r.precision) for r in s.classes],
    )  # fmt: skip
    write_csv(
        folder / "confusion.csv", ["label \\ prediction", *names],
        [[n, *c] for n, c in zip(names, s.confusion, strict=True)],
    )  # fmt: skip
    write_csv(
        folder / "calibration.csv", ("low", "high", "images", "confidence", "accuracy"),
        [(b.low, b.high, b.images, b.confidence, b.accuracy) for b in s.calibration],
    )  # fmt: skip
    try:
        text = html_page(assessment, about, title)
    except ImportError as error:
        raise UserError(f"the page needs matplotlib (pip install matplotlib): {error}") from error
    (folder / "eval.html").write_text(text, encoding="utf-8")
    return [folder / n for n in ("eval.json", "classes.csv", "confusion.csv", "calibration.csv", "eval.html")]


def html_page(assessment: Assessment, about: dict[str, Any], title: str) -> str:
    """The page; ImportError without matplotlib."""
    s, protocol = assessment.summary, assessment.protocol
    rows = [(html.escape(r.name), r.support, percent(r.top1), percent(r.top5), percent(r.precision)) for r in s.classes]
    wrong = [(html.escape(a), html.escape(b), n, f"{share:.1%}") for a, b, n, share in confusions(s)]
    views = f"{protocol.count} view{'s' if protocol.count > 1 else ''} an image ({protocol.name})"
    return page(
        title,
        f"{s.samples:,} images, {views}, {assessment.networks} network{'s' if assessment.networks > 1 else ''}",
        [
            cards([
                (f"{s.top1:.2%}", "top-1 accuracy"), (f"{s.top5:.2%}", "top-5 accuracy"), (f"{s.loss:.4f}", "loss (nats)"),
                (f"{s.ece:.4f}", "expected calibration error"), (f"{assessment.images_per_s:,.1f}", "images/s"),
                (f"{assessment.data_wait:.1%}", "of the time waiting for views"),
            ]),
            section("Confusion matrix", image(draw_confusion(s), "Confusion matrix, share of each label's images")),
            section("Most frequent confusions", table(("label", "taken for", "images", "share of the label"), wrong)),
            section("Calibration", image(draw_calibration(s), "Accuracy by confidence, and images by confidence")),
            section(
                "Classes",
                f'<div class="wide">{table(("class", "images", "top-1", "top-5", "precision"), rows)}</div>',
            ),
            section("What was evaluated", table(("", ""), [(html.escape(k), html.escape(str(v))) for k, v in about.items()])),
        ],
    )  # fmt: skip


def draw_confusion(summary: Summary) -> bytes:
    """The matrix as SVG, each row divided by its number of images."""
    import numpy as np

    counts = np.asarray(summary.confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    k = len(shares)
    side = min(9.0, max(4.0, 0.5 * k + 1.5)) if k <= NAMED else 8.0
    figure, (axis,) = subplots(1, (side + 1, side))
    axis.grid(False)
    # The square root lets rare confusions be seen beside the diagonal.
    shown = axis.imshow(np.sqrt(shares), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    if k <= NAMED:
        names = [row.name for row in summary.classes]
        axis.set_xticks(range(k), names, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(k), names, fontsize=8)
    if k <= 15:
        for i, j in np.argwhere(counts > 0):
            colour = "black" if shares[i, j] > 0.4 else "white"
            axis.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xlabel("prediction")
    axis.set_ylabel("label")
    ticks = (0, 0.01, 0.05, 0.2, 0.5, 1)
    bar = figure.colorbar(shown, ax=axis, ticks=[t**0.5 for t in ticks], shrink=0.8)
    bar.ax.set_yticklabels([f"{t:.0%}" for t in ticks])
    return svg(figure)


def draw_calibration(summary: Summary) -> bytes:
    """A reliability diagram as SVG, with the distribution of confidences beside it."""
    figure, (left, right) = subplots(2, (9.6, 3.8))
    filled = [b for b in summary.calibration if b.images]
    width = summary.calibration[0].high - summary.calibration[0].low
    left.bar([b.low for b in filled], [b.accuracy for b in filled], width, align="edge", color="#0f8b6f", alpha=0.7)
    left.plot([b.confidence for b in filled], [b.accuracy for b in filled], ".", color="black", ms=4)
    left.plot([0, 1], [0, 1], ls="--", lw=1, color="#888")
    left.set_title(f"accuracy by confidence, ECE {summary.ece:.4f}", loc="left", fontsize=10)
    left.set_ylim(0, 1.02)
    right.bar(
        [b.low for b in summary.calibration],
        [b.images for b in summary.calibration],
        width,
        align="edge",
        color="#c2571a",
    )
    right.set_yscale("symlog")
    right.set_title("images by confidence", loc="left", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("confidence")
        axis.set_xlim(0, 1)
    return svg(figure)
