"""Options, the ``bench`` fixture that every case uses, the summary, and the storing of results."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent / "tests")
)  # parity.py: one tolerance rule for the project

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = pytest.StashKey[list[record.Row]]()
TABLES = pytest.StashKey[list[tuple[str, list[str]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres benchmarks")
    group.addoption(
        "--full", action="store_true", help="real sizes (batch 16, 224 pixels) and torch.compile as a baseline"
    )
    group.addoption(
        "--save-results", action="store_true", default=os.environ.get("FASTRES_BENCH_SAVE") == "1",
        help="write benchmarks/results/*.json (or FASTRES_BENCH_SAVE=1)",
    )  # fmt: skip
    group.addoption("--rounds", type=int, default=None, help="timed calls of each contender (5; with --full 11)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[TABLES] = [], []
    if hasattr(config.option, "benchmark_columns"):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]


class Bench:
    """One case: its sizes, its rounds, and where its figures go."""

    def __init__(self, fixture: Any, config: pytest.Config) -> None:
        self.fixture, self.config = fixture, config
        self.full: bool = config.getoption("--full")
        self.rounds: int = config.getoption("--rounds") or (11 if self.full else 5)

    def size(self, small: Any, real: Any) -> Any:
        """``real`` under --full."""
        return real if self.full else small

    def compare(self, suite: str, case: str, shape: str, ours: Any, baselines: dict[str, Any]) -> None:
        """Times ``ours`` against ``baselines``, interleaved; parity has been checked by now."""
        from benchmarks.timing import interleave

        for comparison in interleave(self.fixture, ours, baselines, self.rounds):
            row = {"suite": suite, "case": case, "shape": shape, **comparison.as_row()}
            self.fixture.extra_info[comparison.baseline] = {"ratio": row["ratio"], "baseline_s": row["baseline_s"]}
            self.config.stash[ROWS].append(row)

    def note(self, suite: str, case: str, **values: Any) -> None:
        """Stores figures that are not times."""
        self.fixture.extra_info.update(values)
        self.config.stash[ROWS].append({"suite": suite, "case": case, **values})

    def table(self, title: str, lines: list[str]) -> None:
        """Prints lines below the summary."""
        self.config.stash[TABLES].append((title, lines))


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Bench:
    """The case's measuring device; seeds torch."""
    torch.manual_seed(0)
    return Bench(benchmark, request.config)


@pytest.fixture(params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """fp32 and bf16."""
    return DTYPES[request.param]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    timed = [row for row in rows if "ratio" in row]
    if timed:
        terminalreporter.section("fused against baselines: ratio of medians, above 1 where ours is faster")
        width = max(len(row["case"]) for row in timed)
        for row in timed:
            ratio, ours, theirs = row["ratio"], row["ours_s"]["median"], row["baseline_s"]["median"]
            terminalreporter.write_line(
                f"{row['case']:<{width}}  {ratio['value']:6.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]  "
                f"{1e3 * ours:9.2f} ms, {row['baseline']}: {1e3 * theirs:9.2f} ms  {row['shape']}"
            )
    kept = [row for row in rows if "saved_bytes" in row]
    if kept:
        terminalreporter.section("bytes saved for backward, as a share of torchvision's")
        for row in kept:
            terminalreporter.write_line(f"{row['case']:<22} {row['saved_bytes']:>12,}  {row['share']:.3f}")
    peers = [row for row in rows if row["suite"] == "peers"]
    if peers:
        from fastres.evaluate.peers.table import text_tables

        terminalreporter.section("fastres plans against other runtimes")
        for line in text_tables(peers):
            terminalreporter.write_line(line)
    for title, lines in config.stash[TABLES]:
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    if rows and config.getoption("--save-results"):
        for path in record.save(rows, {"full": bool(config.getoption("--full"))}):
            terminalreporter.write_line(f"wrote {path.relative_to(record.ROOT)}")
