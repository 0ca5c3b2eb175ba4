"""``fastres.tune``: measures, for every convolution of a network, who computes it fastest here."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres import _library, backends, device_tuner, tuning
from fastres.contest import Candidate, Results, Timer, decide, rounds_of
from fastres.errors import CompileError, InputError
from fastres.inference import compile as compile_network
from fastres.ops.schemas import OPS, overload

# A candidate whose result differs from the library's by more (relative, L2) is dropped: the rounding of each dtype, generously.
_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass
class TunedRow:
    """One problem: what was measured, in milliseconds by candidate, who won, and why others were dropped."""

    layer: str
    problem: str
    choice: str
    ms: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass
class TuningReport:
    """What :func:`tune` found; ``file`` is where it is kept."""

    rows: list[TunedRow]
    file: Path | None = None

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            times = "  ".join(f"{name} {ms:.3f}" for name, ms in sorted(row.ms.items(), key=lambda item: item[1]))
            dropped = "".join(f"  ({name} dropped: {why})" for name, why in row.dropped.items())
            lines.append(f"{row.layer or '-':28s} {row.choice:12s} ms: {times}{dropped}")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    example: Tensor,
    *,
    rounds: int = 5,
    save: bool = True,
    progress: Callable[[str], None] | None = None,
) -> TuningReport:
    """Measures the convolutions of ``model`` on inputs like ``example`` and keeps the choices for this machine.

    In training mode: ``conv_stats`` forward and backward, by backend. In evaluation mode: the steps of the inference
    plan, by kernel, and ``conv_act``, by backend. On a GPU: every op, the configurations of our kernels first and then the
    backends, as ``auto`` does by itself at first sight. Every candidate's result is compared with the library's first.
    Problems that were measured before are measured again. Plans that exist already keep their kernels.

    Args:
        model: fused (``fastres.create_model`` or ``fastres.fuse``). example: [N, C, H, W], on the model's device.
        rounds: measurements of each candidate, in turns; their median counts.
        save: write the file of choices (:func:`fastres.tuning.path`). progress: called with a line per problem.

    Raises:
        InputError: neither on the CPU nor on a CUDA GPU, or nothing to tune.
    """
    if example.device.type not in ("cpu", "cuda"):
        raise InputError(f"tune() measures kernels of the CPU and of CUDA GPUs, but the example is on {example.device}")
    tell = progress or (lambda line: None)
    if example.device.type == "cuda":
        return _tune_gpu(_problems(model, example, all_ops=True), device_tuner.cuda_timer(rounds), save, tell)
    found: dict[str, TunedRow] = {}
    for layer, problem in _problems(model, example):
        name = problem.key()
        if name is not None and name not in found:
            found[name] = _measure(layer, problem, name, rounds)
            tell(str(TuningReport([found[name]])))
    if not model.training:
        for row in _plan_rows(model, example, rounds):
            found[row.problem] = row
            tell(str(TuningReport([row])))
    if not found:
        raise InputError("tune() found no convolution of fastres in this network; fuse it first: fastres.fuse(model)")
    rows = list(found.values())
    file = tuning.save({row.problem: {"choice": row.choice, "ms": row.ms} for row in rows}) if save else None
    return TuningReport(rows, file)


def _tune_gpu(
    problems: Iterable[tuple[str, backends.Problem]], timer: Timer, save: bool, tell: Callable[[str], None]
) -> TuningReport:
    """Measures each problem once, and remembers and keeps the choices of backends and configurations."""
    rows: dict[str, TunedRow] = {}
    everything: device_tuner.Found = {}
    device = "cuda"
    for layer, problem in problems:
        name, device = problem.key(), problem.device
        if name is None or name in rows:
            continue
        decision, found = device_tuner.measure(problem, name, timer)
        everything.update(found)
        rows[name] = TunedRow(layer, name, decision.choice, decision.ms, decision.dropped)
        tell(str(TuningReport([rows[name]])))
    if not rows:
        raise InputError("tune() found no op of fastres in this network; fuse it first: fastres.fuse(model)")
    file = tuning.save(everything, device) if save else None
    tuning.remember(everything, device)
    return TuningReport(list(rows.values()), file)


def _problems(model: nn.Module, example: Tensor, all_ops: bool = False) -> Iterator[tuple[str, backends.Problem]]:
    """The convolutions, or all ops, of one forward, with the layers they belong to; running statistics are put back."""
    kept = {name: value.clone() for name, value in model.named_buffers()}
    names = {id(module): name for name, module in model.named_modules()}
    try:
        # by the library: on a GPU nothing is to be measured before its turn
        with torch.no_grad(), backends.use_backend("library"), backends.recording(names) as recorder:
            model(example)
    finally:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(kept[name])
    for layer, problem, _ in recorder.rows:
        if all_ops or problem.conv is not None:
            yield layer, problem


def _runner(problem: backends.Problem, backend: str) -> Callable[[], list[Tensor]]:
    """A forward (conv_act) or a forward and backward (conv_stats) on random tensors of the problem."""
    conv = problem.conv
    assert conv is not None
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        t = torch.randn(sizes, generator=generator).to(problem.dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else t

    x, weight = random(*problem.shape), random(*conv.weight)
    vectors = [torch.rand(problem.shape[1], generator=generator) + 0.5 for _ in range(3)]
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if problem.op == "conv_act":
        return lambda: [overload("conv_act", backend)(x, weight, random(conv.weight[0]), None, True, *geometry)]
    forward, backward = overload("conv_stats", backend), overload("conv_stats", backend, "backward")

    def step() -> list[Tensor]:
        y, mean, var = forward(x, weight, *vectors, True, *geometry, True)
        grads = backward(y, mean, var, x, weight, y, mean, *vectors, True, *geometry, True, True)
        return [y, mean, var, *grads]

    return step


def _measure(layer: str, problem: backends.Problem, name: str, rounds: int) -> TunedRow:
    """Times the backends that serve a problem, in turns."""
    names = [b for b in OPS[problem.op].backends if b != "reference"]
    usable = [b for b in names if backends.refusal(b, problem.op, "cpu", problem.dtype) is None]
    candidates = [Candidate(b, _runner(problem, b)) for b in ("library", *(b for b in usable if b != "library"))]

    def judge(mine: Results, expected: Results) -> str | None:
        worst = max((_difference(a, b) for a, b in zip(mine, expected, strict=True)), default=0.0)
        return f"differs from the library by {worst:.1e}" if worst > _AGREEMENT.get(problem.dtype, 1e-3) else None

    with torch.no_grad():  # on the CPU nothing is gained by staying with the library: no tie
        decision = decide(candidates, judge, rounds_of(_milliseconds, rounds), what=name, tie=0.0)
    return TunedRow(layer, name, decision.choice, decision.ms, decision.dropped)


def _milliseconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    norm = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / max(norm, 1e-30)


def _plan_rows(model: nn.Module, example: Tensor, rounds: int) -> list[TunedRow]:
    """The convolution steps of the network's plan, each by every kernel that serves it."""
    times: dict[str, dict[str, float]] = {}
    layers: dict[str, str] = {}
    kernels = _library._native.conv_kernels() if _library._native is not None else []
    for kernel in kernels:
        plan = _plan_with(model, example, kernel)
        if plan is None:
            continue
        for step in plan.profile(example, rounds):
            if step.get("problem") and step["kernel"] == kernel:
                times.setdefault(step["problem"], {})[kernel] = step["seconds"] * 1e3
                layers.setdefault(step["problem"], step["name"])
    return [TunedRow(layers[p], p, min(ms, key=ms.__getitem__), ms) for p, ms in times.items()]


def _plan_with(model: nn.Module, example: Tensor, kernel: str) -> Any:
    """A plan that uses ``kernel`` wherever it serves, checked against the network; ``None`` where it serves nowhere."""
    try:
        first = compile_network(model, example)
        wanted = {step["name"]: kernel for step in first.steps() if kernel in step.get("candidates", ())}
        return compile_network(model, example, kernels=wanted) if wanted else None
    except CompileError:
        return None
