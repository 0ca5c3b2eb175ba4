"""Draw the curves of one or several training runs: error by epoch and by time, loss, throughput."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from fastres.cli.options import console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("runs", nargs="+", type=str, metavar="DIR", help="folders that fastres train wrote")
    parser.add_argument("-o", "--output", type=str, default="curves.png", metavar="FILE", help="png, svg or pdf")


def run(options: Namespace) -> int:
    """Draw and say where."""
    from fastres.errors import UserError

    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"plot needs matplotlib (pip install matplotlib): {error}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fastres.train.records import read_log

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    panels = (
        (axes[0, 0], "epoch", "error (%)"), (axes[0, 1], "time (s)", "error (%)"),
        (axes[1, 0], "epoch", "loss (nats)"), (axes[1, 1], "epoch", "training images/s"),
    )  # fmt: skip
    for number, folder in enumerate(options.runs):
        rows = read_log(folder)
        if not rows:
            raise UserError(f"{Path(folder) / 'log.csv'} has no finished epoch yet")
        name, colour = Path(folder).resolve().name, f"C{number % 10}"
        epochs, times = [r.epoch for r in rows], [r.total_s for r in rows]
        for axis, x in ((axes[0, 0], epochs), (axes[0, 1], times)):
            axis.plot(x, [100 * (1 - r.test_acc) for r in rows], color=colour, marker=".", lw=2, label=f"{name}, test")
            axis.plot(x, [100 * (1 - r.train_acc) for r in rows], color=colour, ls="--", lw=1, label=f"{name}, train")
        axes[1, 0].plot(epochs, [r.test_loss for r in rows], color=colour, marker=".", lw=2)
        axes[1, 0].plot(epochs, [r.train_loss for r in rows], color=colour, ls="--", lw=1)
        axes[1, 1].plot(epochs, [r.images_per_s for r in rows], color=colour, marker=".")
    for axis, x_label, y_label in panels:
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        if axis is axes[1, 0]:
            axis.set_yscale("log")  # the first epochs of a large learning rate would hide all others
        else:
            axis.set_ylim(bottom=0)
        if x_label == "epoch":
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    try:
        figure.savefig(options.output, dpi=130)
    except ValueError as error:
        raise UserError(f"can't write {options.output}: {error}") from error
    finally:
        plt.close(figure)
    console().print(f"wrote {options.output}", markup=False, highlight=False, soft_wrap=True)
    return 0
