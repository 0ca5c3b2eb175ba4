"""Writes the figures of README.md from the stored results: ``python -m benchmarks.report``; ``--check`` only compares.

No figure of the README is typed by hand: what stands between the markers is this program's output. The plot
(docs/images/benchmarks.svg) is drawn from the same files.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import record
from benchmarks.record import ROOT, Row

README = ROOT / "README.md"
PLOT = ROOT / "docs" / "images" / "benchmarks.svg"
PEERS_PLOT = ROOT / "docs" / "images" / "peers.svg"
BEGIN, END = "<!-- benchmarks: written by python -m benchmarks.report -->", "<!-- end of benchmarks -->"
PEERS_BEGIN, PEERS_END = "<!-- peers: written by python -m benchmarks.report -->", "<!-- end of peers -->"
NOTHING = "No results are stored yet."
EAGER, COMPILED = "eager channels_last", "torch.compile, channels_last"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit code 1 if the README differs from the stored results"
    )
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    try:
        new = with_figures(old, render())
        new = with_figures(new, section("peers", peers_table) or NOTHING, PEERS_BEGIN, PEERS_END)
    except ValueError as error:
        print(f"README.md: {error}", file=sys.stderr)
        return 1
    if options.check:
        if new != old:
            print("README.md does not match benchmarks/results; run python -m benchmarks.report", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    draw()
    plots = [PLOT]
    if peers := record.load("peers"):
        from fastres.evaluate.peers.plot import draw as draw_peers

        draw_peers(peers["rows"], PEERS_PLOT)
        plots.append(PEERS_PLOT)
    print(f"wrote {', '.join(str(path.relative_to(ROOT)) for path in (README, *plots))}")
    return 0


def with_figures(text: str, figures: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with ``figures`` between the markers ``begin`` and ``end``.

    Raises:
        ValueError: the markers are not there exactly once, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin!r} and then {end!r}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{figures}\n{end}{rest.split(end)[1]}"


def render() -> str:
    """All tables, as Markdown."""
    parts = [
        text
        for suite, table in (("models", models_table), ("memory", memory_table), ("ops", ops_table))
        if (text := section(suite, table)) is not None
    ]
    return "\n\n".join(parts) if parts else NOTHING


def section(suite: str, table: Callable[[list[Row]], Iterator[str]]) -> str | None:
    """A table with what it was measured on below, or None without results."""
    content = record.load(suite)
    if content is None or not content["rows"]:
        return None
    machine, versions, rows = content["machine"], content["versions"], content["rows"]
    isa = f", {machine['isa']} kernels" if machine["isa"] else ""
    dates = sorted({row["date"][:10] for row in rows})
    commits = sorted({row["commit"] or "before the first commit" for row in rows})
    versions_text = f"torch {versions['torch']}, oneDNN {versions['onednn']}, fastres {versions['fastres']}"
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    source = (
        f"<sub>{machine['cpu']}, {machine['threads']} threads{isa}; {versions_text} ({', '.join(commits)}); {when}; "
        f"benchmarks/results/{suite}.json</sub>"
    )
    return "\n".join([*table(rows), "", source])


def ratio_text(row: Row | None) -> str:
    """``1.12 (1.10–1.15)``: ratio of medians, quartiles of the rounds' ratios."""
    if row is None:
        return "–"
    ratio = row["ratio"]
    return f"{ratio['value']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def models_table(rows: list[Row]) -> Iterator[str]:
    yield "Speed of fused networks on the CPU: time of the baseline / time of ours (quartiles), above 1 is faster."
    yield ""
    yield "| network | pass | dtype | input | ours | against eager PyTorch | against torch.compile |"
    yield "|---|---|---|---|---:|---:|---:|"
    for case in dict.fromkeys(row["case"] for row in rows):
        name, mode, dtype = case.split("-")
        mine = {row["baseline"]: row for row in rows if row["case"] == case}
        any_row = next(iter(mine.values()))
        ours = f"{1e3 * any_row['ours_s']['median']:.0f} ms"
        shape = any_row["shape"].replace("x", "×")
        ratios = f"{ratio_text(mine.get(EAGER))} | {ratio_text(mine.get(COMPILED))}"
        yield f"| {name} | {'training step' if mode == 'step' else mode} | {dtype} | {shape} | {ours} | {ratios} |"


def memory_table(rows: list[Row]) -> Iterator[str]:
    yield "Bytes saved for backward in a training step at batch 1 and 224 pixels."
    yield ""
    yield '| network | torchvision | fused | share | fused, `memory="recompute"` | share |'
    yield "|---|---:|---:|---:|---:|---:|"
    by_case = {row["case"]: row for row in rows}
    for name in dict.fromkeys(row["case"].split("-")[0] for row in rows):
        modes = [by_case.get(f"{name}-{mode}") for mode in ("default", "recompute")]
        cells = [f"{m['saved_bytes'] / 2**20:.1f} MiB | {m['share']:.3f}" if m else "– | –" for m in modes]
        baseline = next(m for m in modes if m)["baseline_bytes"]
        yield f"| {name} | {baseline / 2**20:.1f} MiB | {cells[0]} | {cells[1]} |"


def ops_table(rows: list[Row]) -> Iterator[str]:
    yield "Speed of the ops as `auto` chooses them on the CPU, against the composition of ATen operations."
    yield ""
    yield "| op | backend | dtype | map | forward | backward |"
    yield "|---|---|---|---|---:|---:|"
    by_case = {row["case"]: row for row in rows}
    names = dict.fromkeys(row["case"].rsplit("-", 3)[0] for row in rows)
    for name in names:
        # What auto prefers: native where the op has it, else the library.
        backend = next((b for b in ("native", "library") if any(c.startswith(f"{name}-{b}-") for c in by_case)), None)
        for dtype in ("fp32", "bf16"):
            pair = [by_case.get(f"{name}-{backend}-{dtype}-{mode}") for mode in ("forward", "backward")]
            shape = next((row["shape"].replace("x", "×") for row in pair if row), None)
            if shape:
                yield f"| {name} | {backend} | {dtype} | {shape} | {ratio_text(pair[0])} | {ratio_text(pair[1])} |"


def peers_table(rows: list[Row]) -> Iterator[str]:
    from fastres.evaluate.peers.table import markdown

    yield from markdown(rows)
    yield ""
    yield "![Inference times of fastres and other runtimes](docs/images/peers.svg)"


def draw() -> None:
    """Speed-ups and shares of memory, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastres"  # the same results give the same file
    from matplotlib import pyplot

    models = [row for row in (record.load("models") or {"rows": []})["rows"] if row["baseline"] == EAGER]
    memory = (record.load("memory") or {"rows": []})["rows"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for place, row in enumerate(reversed(models)):
        ratio = row["ratio"]
        spread = [[max(ratio["value"] - ratio["low"], 0)], [max(ratio["high"] - ratio["value"], 0)]]
        left.barh(place, ratio["value"], 0.6, color="#0f8b6f", xerr=spread, ecolor="#555", capsize=2)
    left.set_yticks(range(len(models)), [row["case"].replace("-", ", ") for row in reversed(models)], fontsize=8)
    left.axvline(1, color="#c2571a", lw=1.5)
    left.set_title("speed, eager PyTorch = 1", loc="left", fontsize=10)
    names = list(dict.fromkeys(row["case"].split("-")[0] for row in memory))
    for offset, (mode, colour) in zip((-0.2, 0.2), (("default", "#0f8b6f"), ("recompute", "#7cc4b2")), strict=True):
        shares = {row["case"]: row["share"] for row in memory}
        heights = [shares.get(f"{name}-{mode}", 0.0) for name in names]
        bars = right.bar([i + offset for i in range(len(names))], heights, 0.38, color=colour, label=f"fused, {mode}")
        right.bar_label(bars, fmt="%.2f", fontsize=7)
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.axhline(1, color="#c2571a", lw=1.5)
    right.set_title("bytes saved for backward, torchvision = 1", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.97))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    save: dict[str, Any] = {"metadata": {"Date": None}}
    figure.savefig(PLOT, **save)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
