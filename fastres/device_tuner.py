"""Measures one problem on a GPU: first each Triton kernel's configurations, then the backends, all against the library.

Nothing here needs a GPU but the clock and the capability, which are arguments; the decision is :mod:`fastres.contest`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastres import backends, tuning
from fastres.contest import Candidate, Decision, Results, Timer, decide, rounds_of, rule
from fastres.kernels.common import triton_choice
from fastres.kernels.common.precision import tf32_allowed
from fastres.kernels.common.triton_launch import Config
from fastres.ops.schemas import OPS, overload

VARIABLE = "FASTRES_AUTOTUNE"
ROUNDS = 7
LIBRARY = "library"


@dataclass(frozen=True)
class Part:
    """One Triton kernel of a problem: the configurations it may run with, and a call in which it does most of the work."""

    kernel: str
    key: str
    configs: tuple[Config, ...]
    run: Callable[[str], Results]  # by backend


@dataclass(frozen=True)
class Work:
    """What is measured of a problem. ``whole`` is a forward, in training with its backward, by backend."""

    whole: Callable[[str], Results]
    parts: Callable[[tuple[int, int]], Sequence[Part]] = lambda capability: ()


Found = dict[str, dict[str, Any]]  # what tuning keeps, by key


def measure(
    problem: backends.Problem,
    name: str,
    timer: Timer,
    *,
    device: str | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[Decision, Found]:
    """Who computes ``problem`` fastest, and what to remember: its backend under ``name``, each kernel's configuration
    under that kernel's key. Dropped candidates are warned of by name."""
    work = work_of(problem, device or problem.device)
    usable = [
        b for b in OPS[problem.op].backends
        if b not in ("reference", LIBRARY)
        and backends.refusal(b, problem.op, problem.device, problem.dtype, problem.shape) is None
    ]  # fmt: skip
    found: Found = {}
    # Where products of float32 may be TF32, two right programs agree to its 10 bits of mantissa, no better.
    judge = rule(problem.dtype, tf32=problem.conv is not None and tf32_allowed(problem.dtype))
    with torch.no_grad():
        for part in work.parts(capability or triton_choice.capability()) if "triton" in usable else ():
            decision = decide(_configured(part), judge, timer, what=part.key)
            ours = {config: ms for config, ms in decision.ms.items() if config != LIBRARY}
            if ours:
                found[part.key] = {"choice": min(ours, key=ours.__getitem__), "ms": decision.ms}
        configs = (
            {p.kernel: _named(p, found) for p in work.parts(capability or triton_choice.capability())} if found else {}
        )
        candidates = [Candidate(LIBRARY, partial(work.whole, LIBRARY))]
        candidates += [Candidate(b, partial(_with, configs if b == "triton" else {}, work.whole, b)) for b in usable]
        decision = decide(candidates, judge, timer, what=name)
    found[name] = {"choice": decision.choice, "ms": decision.ms}
    return decision, found


def _configured(part: Part) -> list[Candidate]:
    calls = [(str(config), partial(_with, {part.kernel: config}, part.run, "triton")) for config in part.configs]
    return [Candidate(LIBRARY, partial(part.run, LIBRARY)), *(Candidate(name, call) for name, call in calls)]


def _named(part: Part, found: Found) -> Config:
    wanted = found.get(part.key, {}).get("choice")
    return next((c for c in part.configs if str(c) == wanted), part.configs[0])


def _with(configs: dict[str, Config], run: Callable[[str], Results], backend: str) -> Results:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for kernel, config in configs.items():
            stack.enter_context(triton_choice.forcing(kernel, config))
        return run(backend)


def work_of(problem: backends.Problem, device: str) -> Work:
    """Random tensors of the problem and the calls on them. No pre-activation lies near zero, so that no two correct
    kernels disagree about a ReLU: inputs are multiples of 1/4, centers lie between."""
    generator = torch.Generator(device).manual_seed(0)

    def quarters(*shape: int) -> Tensor:
        t = torch.randint(-8, 9, shape, generator=generator, device=device).to(problem.dtype) / 4
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    def normal(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator, device=device).to(problem.dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    def vectors(channels: int) -> list[Tensor]:
        scale = torch.rand(channels, generator=generator, device=device) + 0.5
        return [scale, torch.full_like(scale, 0.125), torch.zeros_like(scale)]

    channels = problem.shape[1]
    if problem.conv is None:
        return _pointwise_work(problem, quarters(*problem.shape), quarters(*problem.shape), vectors(channels), normal)
    conv = problem.conv
    x, weight = quarters(*problem.shape), normal(*conv.weight)
    weight = weight / max(weight[0].numel(), 1) ** 0.5
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    if problem.op == "conv_act":
        bias = torch.randn(weight.shape[0], generator=generator, device=device)

        def act(backend: str) -> Results:  # no ReLU: sums near zero may round to either side
            return [overload("conv_act", backend)(x, weight, bias, None, False, *geometry)]

        return Work(act, partial(_forward_parts, x, weight, None, act, conv))
    return _training_work(x, weight, vectors(channels), geometry, normal, conv)


def _pointwise_work(
    problem: backends.Problem, y: Tensor, residual: Tensor, vectors: list[Tensor], normal: Callable[..., Tensor]
) -> Work:
    grad = normal(*problem.shape)
    if problem.op in ("scale_shift_act", "scale_shift_act_mean"):
        grad = grad if problem.op == "scale_shift_act" else normal(*problem.shape[:2])
        residual = residual.abs()  # of one sign with what it is added to: nothing cancels to almost zero
        shifted = [vectors[0], vectors[1] - 4.0, vectors[2]]

        def step(backend: str) -> Results:
            arguments = (y, *shifted, residual, None, None, None, True)
            out = overload(problem.op, backend)(*arguments)
            grads = overload(problem.op, backend, "backward")(grad, *arguments, True)
            return [out, *(g for g in grads if g.numel())]

        return Work(step)

    if problem.op == "batch_norm_act":
        bias = torch.full_like(vectors[0], 8.0)  # larger than what it is added to: no pre-activation near zero
        bias[::2] = -8.0

        def normalised(backend: str) -> Results:
            out, mean, var = overload(problem.op, backend)(y, vectors[0], bias, residual, 1e-5, True)
            arguments = (grad, y, vectors[0], bias, residual, mean, var, 1e-5, True, True)
            return [out, mean, var, *overload(problem.op, backend, "backward")(*arguments)]

        return Work(normalised)

    def pooled(backend: str) -> Results:
        window = (True, 3, 2, 1)
        out, index = overload(problem.op, backend)(y, *vectors, *window)
        grads = overload(problem.op, backend, "backward")(out, index, y, *vectors, *window)
        return [out, *grads]

    return Work(pooled)


def _training_work(
    x: Tensor,
    weight: Tensor,
    vectors: list[Tensor],
    geometry: Any,
    normal: Callable[..., Tensor],
    conv: backends.Geometry,
) -> Work:
    forward, backward = partial(overload, "conv_stats"), partial(overload, "conv_stats", suffix="backward")
    y, mean, var = forward(LIBRARY)(x, weight, *vectors, True, *geometry, True)
    grad = normal(*y.shape)

    def gradients(backend: str, of_input: bool, of_weight: bool) -> Results:
        arguments = (grad, mean, var, x, weight, y, mean, *vectors, True, *geometry, of_input, of_weight)
        return [g for g in backward(backend=backend)(*arguments) if g.numel()]

    def ahead(backend: str) -> Results:
        return list(forward(backend)(x, weight, *vectors, True, *geometry, True))

    def step(backend: str) -> Results:
        return [*ahead(backend), *gradients(backend, True, True)]

    def parts(capability: tuple[int, int]) -> list[Part]:
        from fastres.kernels.conv_stats import triton_input_gradient, triton_weight_gradient

        found = _forward_parts(x, weight, vectors[0], ahead, conv, capability)
        for module, kernel, flags in (
            (triton_input_gradient, "input_gradient_kernel", (True, False)),
            (triton_weight_gradient, "weight_gradient_kernel", (False, True)),
        ):
            problem = _triton_problem(x, weight, vectors[0], conv)
            if problem is not None:
                configs = triton_choice.offered(kernel, module.configurations(problem), capability, problem.sixteen_bit)
                run = partial(lambda flags, backend: gradients(backend, *flags), flags)
                found.append(Part(kernel, triton_choice.key(kernel, problem), configs, run))
        return found

    return Work(step, parts)


def _triton_problem(x: Tensor, weight: Tensor, scale: Tensor | None, conv: backends.Geometry) -> Any:
    """The problem as the Triton kernels see it; None where the library serves them (groups, empty maps)."""
    from fastres.kernels.common.triton_conv import ConvProblem

    if conv.groups > 1 or not x.numel():
        return None
    return ConvProblem.of(
        x, weight, conv.stride, conv.padding, conv.dilation, scale, scale is not None, scale is not None
    )


def _forward_parts(
    x: Tensor, weight: Tensor, scale: Tensor | None, run: Callable[[str], Results], conv: backends.Geometry,
    capability: tuple[int, int],
) -> list[Part]:  # fmt: skip
    from fastres.kernels.conv import triton_run

    problem = _triton_problem(x, weight, scale, conv)
    if problem is None:
        return []
    configs = triton_choice.offered(
        "conv_forward", triton_run.configurations(problem, capability), capability, problem.sixteen_bit
    )
    return [Part("conv_forward", triton_choice.key("conv_forward", problem), configs, run)]


def cuda_timer(rounds: int = ROUNDS) -> Timer:
    """Milliseconds by CUDA events on the current stream; what the GPU does, not what launching costs the CPU."""

    def clock(run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()  # the caches are as this candidate leaves them
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return rounds_of(clock, rounds)


def may_measure(x: Tensor) -> bool:
    """Whether a problem may be timed now: real memory on a GPU, and neither torch.compile nor a CUDA graph recording."""
    if os.environ.get(VARIABLE, "") == "OFF" or x.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if type(x) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return False
    return not torch.cuda.is_current_stream_capturing()


def first_sight(problem: backends.Problem, name: str, timer: Timer | None = None) -> str:
    """Measures a problem that was not seen before, remembers and keeps the result, and returns the backend.

    Whatever goes wrong leaves the library in place for this process, with a warning.
    """
    try:
        decision, found = measure(problem, name, timer or cuda_timer())
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        warnings.warn(
            f"fastres: {name} could not be measured ({message}); the library serves", RuntimeWarning, stacklevel=3
        )
        decision, found = Decision(LIBRARY), {name: {"choice": LIBRARY, "ms": {}}}
        tuning.remember(found, problem.device)
        return LIBRARY
    tuning.remember(found, problem.device)
    if tuning.path() is not None:
        try:
            tuning.save(found, problem.device)
        except OSError as error:
            warnings.warn(f"fastres: measured choices can't be kept: {error}", RuntimeWarning, stacklevel=3)
        tuning.remember(found, problem.device)
    return decision.choice
