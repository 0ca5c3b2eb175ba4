"""Curves of training runs: an overview, and figures in the style of the ResNet paper (He et al. 2015)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from fastres.errors import UserError
from fastres.evaluate.page import subplots
from fastres.train.records import Row

Style = Literal["overview", "fig1", "fig4", "fig6"]
STYLES: tuple[str, ...] = get_args(Style)
Runs = dict[str, list[Row]]


def draw(runs: Runs, style: str = "overview") -> Any:
    """A matplotlib figure of one or several runs.

    Args:
        runs: rows by name; a run is drawn in one colour.
        style: ``"fig1"`` has training and test error side by side, ``"fig4"`` thin lines of the training and bold lines
            of the test error, ``"fig6"`` the same with dashed training lines and an axis that ends at 20 %, all against
            iterations. ``"overview"`` shows error, loss, rate, images/s and the wait for data by epoch and time.

    Raises:
        UserError: an unknown style, no run, or a run without a finished epoch.
    """
    if style not in STYLES:
        raise UserError(f"unknown style {style!r}; expected {', '.join(STYLES)}")
    empty = [name for name, rows in runs.items() if not rows]
    if empty or not runs:
        raise UserError(f"{empty[0]} has no finished epoch yet" if empty else "there is no run to draw")
    return _overview(runs) if style == "overview" else _paper(runs, style)


def error(rows: list[Row], which: Literal["train", "test"]) -> list[float]:
    """Error in percent by epoch."""
    return [100 * (1 - (row.train_acc if which == "train" else row.test_acc)) for row in rows]


def _paper(runs: Runs, style: str) -> Any:
    figure, axes = subplots(2 if style == "fig1" else 1, (9.0, 3.6) if style == "fig1" else (5.6, 4.2))
    most = max(rows[-1].iteration for rows in runs.values())
    unit, label = (1e4, "iter. (1e4)") if most >= 1e4 else (1e3, "iter. (1e3)")
    for number, (name, rows) in enumerate(runs.items()):
        x, colour = [row.iteration / unit for row in rows], f"C{number % 10}"
        # A single epoch would be a line without length.
        marker = "." if len(rows) == 1 else ""
        if style == "fig1":
            axes[0].plot(x, error(rows, "train"), color=colour, lw=1.5, marker=marker, label=name)
            axes[1].plot(x, error(rows, "test"), color=colour, lw=1.5, marker=marker, label=name)
        else:
            dashes = {"ls": "--"} if style == "fig6" else {}
            axes[0].plot(x, error(rows, "train"), color=colour, lw=0.9, marker=marker, **dashes)
            axes[0].plot(x, error(rows, "test"), color=colour, lw=2.4, marker=marker, label=name)
    labels = ("training error (%)", "test error (%)") if style == "fig1" else ("error (%)",)
    for axis, text in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.set_ylabel(text)
        axis.set_ylim(0, 20 if style == "fig6" else None)
        axis.set_xlim(0, most / unit)
    axes[-1].legend(frameon=False, fontsize=9)
    return figure


def _overview(runs: Runs) -> Any:
    figure, axes = subplots(3, (13.0, 7.5), rows=2)
    by_epoch, by_time, losses, speed, wait, rate = axes
    for number, (name, rows) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        bold, thin = {"color": colour, "lw": 2, "marker": "."}, {"color": colour, "lw": 0.9}
        epochs, times = [row.epoch for row in rows], [row.total_s for row in rows]
        for axis, x in ((by_epoch, epochs), (by_time, times)):
            axis.plot(x, error(rows, "test"), **bold, label=f"{name}, test")
            axis.plot(x, error(rows, "train"), **thin, label=f"{name}, train")
        losses.plot(epochs, [row.test_loss for row in rows], **bold)
        losses.plot(epochs, [row.train_loss for row in rows], **thin)
        speed.plot(epochs, [row.images_per_s for row in rows], **bold)
        wait.plot(epochs, [100 * row.data_wait_share for row in rows], **bold)
        rate.plot(epochs, [row.lr for row in rows], **bold)
    texts = ("error (%)", "error (%)", "loss (nats)", "training images/s", "waiting for data (%)", "learning rate")
    for axis, text in zip(axes, texts, strict=True):
        axis.set_xlabel("time (s)" if axis is by_time else "epoch")
        axis.set_ylabel(text)
        if axis is losses or axis is rate:
            axis.set_yscale("log")  # the first epochs of a large learning rate would hide all others
        else:
            axis.set_ylim(bottom=0)
        if axis is not by_time:
            axis.xaxis.get_major_locator().set_params(integer=True)
    by_epoch.legend(frameon=False, fontsize="small")
    return figure
