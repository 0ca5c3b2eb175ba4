"""Self-contained HTML pages: one file, styles and figures inside, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mild: #888; --accent: #0f8b6f; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; min-width: 8rem; }
.card b { display: block; font-size: 1.4rem; color: var(--accent); } .card span, .about { color: var(--mild); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: white; border-radius: .3rem; } pre { overflow-x: auto; font-size: .85rem; }
.wide { max-height: 34rem; overflow: auto; }
"""


def page(title: str, about: str, parts: Iterable[str]) -> str:
    """A whole document; ``title`` and ``about`` are text, ``parts`` HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f'<h1>{html.escape(title)}</h1><p class="about">{html.escape(about)}</p>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def cards(items: Iterable[tuple[str, str]]) -> str:
    """Figures with what they mean below; both are text."""
    inside = "".join(f'<div class="card"><b>{html.escape(v)}</b><span>{html.escape(t)}</span></div>' for v, t in items)
    return f'<div class="cards">{inside}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; cells are given as HTML."""
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def section(title: str, *parts: str) -> str:
    """A heading, which is text, and HTML below it."""
    return f"<h2>{html.escape(title)}</h2>" + "".join(parts)


def image(svg: bytes, text: str) -> str:
    """A figure inside the page; ``text`` is for who can't see it."""
    return f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def subplots(columns: int, size: tuple[float, float], rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row, with a grid; matplotlib needs no screen for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Any) -> bytes:
    """The figure's drawing; closes it."""
    from matplotlib import pyplot

    content = io.BytesIO()
    figure.savefig(content, format="svg")
    pyplot.close(figure)
    return content.getvalue()
