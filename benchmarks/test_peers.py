"""Inference of whole networks against other runtimes: eager PyTorch, OpenVINO, ONNX Runtime and whatever else is installed;
--full: five networks, three batch sizes, torch.compile with freezing and with max-autotune, memory and threads.

Every contender's logits are compared with float64 first. Another runtime that can't run, or computes something else, gets
the reason instead of a figure; our own fails.
"""

import pytest
import torch

from benchmarks.conftest import ROWS, Bench
from fastres.evaluate.peers import CONTENDERS, PLAN, Reference, measuring
from fastres.evaluate.peers.memory import memory_row

NETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BATCHES = (1, 8, 32)
QUICK_NETS, QUICK_BATCHES = ("resnet18", "resnet34", "resnet50", "resnet152"), (1, 8)
LEAST_ROUNDS = 9  # of --full, unless --rounds says otherwise
MEMORY_BATCH = 8
_references: dict[str, Reference] = {}


def reference(net: str) -> Reference:
    """The network's float64 logits are computed once for all cases; only the last network is kept."""
    if net not in _references:
        _references.clear()
        _references[net] = Reference(net)
    return _references[net]


def name_of(dtype: torch.dtype) -> str:
    return "bf16" if dtype is torch.bfloat16 else "fp32"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("net", NETS)
def test_peers(bench: Bench, dtype: torch.dtype, net: str, batch: int) -> None:
    if not bench.full and (net not in QUICK_NETS or batch not in QUICK_BATCHES):
        pytest.skip("with --full")
    names = [name for name in CONTENDERS if bench.full or not name.startswith("compile")]
    problem = reference(net).problem(batch, name_of(dtype))
    runs = measuring.prepare(problem, names)
    try:
        ours = next(run for run in runs if run.name == PLAN)
        own = [run for run in runs if run.name.startswith(PLAN) and run.reason]
        if own or ours.call is None:
            pytest.fail(f"no figure for {problem.case}: {own[0].name}: {own[0].reason}", pytrace=False)
        rounds = max(bench.rounds, 1 if bench.config.getoption("--rounds") else LEAST_ROUNDS * bench.full)
        others = [run for run in runs if run is not ours]
        turn = 0

        def before_ours() -> None:
            nonlocal turn
            turn += 1
            measuring.measure(others[turn % len(others) :] + others[: turn % len(others)], 1)
            ours.settle()

        bench.fixture.pedantic(ours.call, setup=before_ours, rounds=rounds, iterations=1)
        if bench.fixture.stats is None:
            return
        ours.seconds = list(bench.fixture.stats.stats.data)
        rows = measuring.rows_of(problem, runs)
        bench.config.stash[ROWS].extend({"suite": "peers", **row} for row in rows)
        best = next((row for row in rows if row["best_peer"]), None)
        if best is not None:
            bench.fixture.extra_info["best peer"] = {"name": best["baseline"], "over_plan": best["over_plan"]}
    finally:
        measuring.release(runs)


@pytest.mark.parametrize("net", NETS)
def test_peers_threads(bench: Bench, dtype: torch.dtype, net: str) -> None:
    if not bench.full:
        pytest.skip("with --full")
    if torch.get_num_threads() < 2:
        pytest.skip("needs two threads")
    rows = bench.fixture.pedantic(
        measuring.scaling, args=(reference(net), 8, name_of(dtype), bench.rounds), rounds=1, iterations=1
    )
    bench.config.stash[ROWS].extend({"suite": "peers", **row} for row in rows)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
def test_peers_memory(bench: Bench, dtype: torch.dtype, net: str, name: str) -> None:
    if not bench.full:
        pytest.skip("with --full")
    arguments = (net, MEMORY_BATCH, name_of(dtype), name, torch.get_num_threads())
    row = bench.fixture.pedantic(memory_row, args=arguments, rounds=1, iterations=1)
    if name.startswith(PLAN) and row["reason"]:
        pytest.fail(f"no figure for {row['case']}: {row['reason']}", pytrace=False)
    bench.config.stash[ROWS].append({"suite": "peers", **row})
