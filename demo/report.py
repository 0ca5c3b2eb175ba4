"""The demo's report: one HTML file with its figures inside."""

import html
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from fastres.evaluate.page import image, subplots, svg, table

COLOURS = {"fused": "#0f8b6f", "reference": "#c2571a"}
NOTE_QUICK = "This was a quick run that shows that everything works: its accuracies and times say little."


def write(
    path: Path,
    *,
    model: str,
    logs: dict[str, list[Any]],
    evaluations: dict[str, dict[str, Any]],
    benches: list[dict[str, Any]],
    memory: list[tuple[str, int, int, int]],
    commands: list[tuple[str, float]],
    seconds: float,
    quick: bool,
) -> None:
    """Renders the page.

    Args:
        logs: rows of log.csv by kind ("fused", "reference"). evaluations: what ``fastres eval --json`` wrote, by kind.
        benches: what ``fastres bench --json`` wrote. memory: (network, bytes of the reference, fused, recompute).
        commands: (command, seconds) in the order in which they ran.
    """
    about = benches[0]["machine"]
    build = about["fastres"]
    step = next(r for r in benches[-1]["results"] if r["mode"] == "step")
    cards = [
        (
            f"{evaluations['fused']['top1']:.1%}",
            f"test accuracy, fused (reference {evaluations['reference']['top1']:.1%})",
        ),
        (
            f"{step['speed_up']['median']:.2f}×" if "speed_up" in step else "–",
            f"speed of a training step of {benches[-1]['model']}, reference = 1",
        ),
        (f"{memory[-1][2] / memory[-1][1]:.0%}", f"of the reference's bytes saved for backward, {memory[-1][0]}"),
        (f"{memory[-1][3] / memory[-1][1]:.0%}", f"with memory=&quot;recompute&quot;, {memory[-1][0]}"),
    ]
    native = (
        "native CPU kernels, " + str(build["isa"])
        if build["native"]
        else f"no native kernels ({build['native_error']})"
    )
    page = Template((Path(__file__).parent / "report.template.html").read_text()).substitute(
        model=model,
        note=f'<p class="note">{NOTE_QUICK}</p>' if quick else "",
        cards="".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards),
        curves=image(curves(logs), "Loss and test error by epoch, fused and reference"),
        evaluation=table(
            ("network", "test images", "top-1", "top-5", "loss", "training images/s (median)"),
            [
                (
                    kind,
                    e["samples"],
                    f"{e['top1']:.2%}",
                    f"{e['top5']:.2%}",
                    f"{e['loss']:.4f}",
                    f"{throughput(logs[kind]):,.0f}",
                )
                for kind, e in evaluations.items()
            ],
        ),
        timing_plot=image(timing(benches), "Speed of the fused networks, the reference being 1"),
        timing=table(
            (
                "network",
                "batch",
                "mode",
                "reference",
                "fused",
                "speed-up (quartiles of the rounds)",
                "parity error (allowed)",
            ),
            [row for bench in benches for row in timing_rows(bench)],
        ),
        memory=table(
            ("network", "reference", "fused", "share", "fused, recompute", "share"),
            [(n, mib(r), mib(f), f"{f / r:.2f}", mib(c), f"{c / r:.2f}") for n, r, f, c in memory],
        ),
        commands=table(("command", "seconds"), [(f"<code>{html.escape(c)}</code>", f"{s:.1f}") for c, s in commands]),
        machine=html.escape(
            f"{about['cpu']}, {about['threads']} threads; torch {about['torch']}, "
            f"fastres {build['version']} ({native}); everything after the installation took {seconds:.0f} s"
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def throughput(rows: list[Any]) -> float:
    values = sorted(row.images_per_s for row in rows)
    return values[len(values) // 2]


def timing_rows(bench: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for r in bench["results"]:
        parity = f"{r['parity_error']:.1e} ({r['parity_allowed']:.1e})"
        size = f"{bench['batch_size']} × {'×'.join(map(str, bench['shape'][1:]))}"
        if "speed_up" in r:
            s = r["speed_up"]
            times = (f"{1e3 * r['reference_s']['median']:.1f} ms", f"{1e3 * r['fused_s']['median']:.1f} ms")
            yield (
                bench["model"],
                size,
                r["mode"],
                *times,
                f"{s['median']:.2f} ({s['low']:.2f} … {s['high']:.2f})",
                parity,
            )
        else:
            yield bench["model"], size, r["mode"], "–", "–", "no figure: parity failed", parity


def curves(logs: dict[str, list[Any]]) -> bytes:
    """Loss and test error by epoch."""
    figure, axes = subplots(2, (9.6, 3.4))
    for kind, rows in logs.items():
        epochs, style = [row.epoch for row in rows], {"color": COLOURS[kind], "lw": 2}
        dashes = {} if kind == "fused" else {"ls": (0, (4, 2))}
        axes[0].plot(epochs, [row.train_loss for row in rows], **style, **dashes, alpha=0.45, label=f"{kind}, training")
        axes[0].plot(
            epochs, [row.test_loss for row in rows], **style, **dashes, marker="o", ms=4, label=f"{kind}, test"
        )
        axes[1].plot(
            epochs, [100 * (1 - row.test_acc) for row in rows], **style, **dashes, marker="o", ms=4, label=kind
        )
    for axis, title in zip(axes, ("loss (nats, logarithmic)", "test error (%)"), strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("epoch")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_yscale("log")  # the first epochs' test loss, with statistics that lag behind, would dwarf the rest
    axes[1].set_ylim(bottom=0)
    return svg(figure)


def timing(benches: list[dict[str, Any]]) -> bytes:
    """Speed-ups as bars with the quartiles of the rounds."""
    bars = [(f"{b['model']}, {r['mode']}", r["speed_up"]) for b in benches for r in b["results"] if "speed_up" in r]
    figure, (axis,) = subplots(1, (9.6, 0.5 + 0.45 * max(len(bars), 1)))
    for place, (_, s) in enumerate(reversed(bars)):
        spread = [[max(s["median"] - s["low"], 0)], [max(s["high"] - s["median"], 0)]]
        axis.barh(place, s["median"], height=0.55, color=COLOURS["fused"], xerr=spread, ecolor="#555", capsize=3)
        axis.text(0.02, place, f"{s['median']:.2f}×", va="center", color="white", fontsize=9)
    axis.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)])
    axis.axvline(1, color=COLOURS["reference"], lw=1.5)
    return svg(figure)
