"""The runtimes that are compared, each as a function that prepares a problem and returns a call without arguments.

All compute the same logits from the same weights and images on ``torch.get_num_threads()`` threads. None is needed: one
that is not installed, or can't run here, says so.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fastres

Call = Callable[[], Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest error of a logit, relative to the largest logit, beside which a time may stand.
LIMITS = {"fp32": 1e-4, "bf16": 5e-2}
DISTINCT = 4  # images that are different; float64 is slow


class Unavailable(Exception):
    """A contender can't run here; the message is shown in place of its figures."""


@dataclass(frozen=True)
class Problem:
    """One network, batch and dtype.

    ``model``: plain PyTorch, float32, channels_last, evaluation mode. ``images``: [N, C, H, W], float32, channels_last.
    ``truth``: [N, classes], float64.
    """

    net: str
    dtype: str
    model: nn.Module
    images: Tensor
    truth: Tensor

    @property
    def batch(self) -> int:
        return len(self.images)

    @property
    def case(self) -> str:
        return f"{self.net}-{self.dtype}-b{self.batch}"

    def error(self, logits: Tensor) -> float:
        """max|logits - truth| / max|truth|; infinite for another shape or what is not finite."""
        if logits.shape != self.truth.shape or not bool(logits.isfinite().all()):
            return float("inf")
        return float((logits.double() - self.truth).abs().max() / self.truth.abs().max())

    def prepared(self) -> tuple[nn.Module, Tensor]:
        """A copy of the network and the images, both in the problem's dtype."""
        dtype = DTYPES[self.dtype]
        return copy.deepcopy(self.model).to(dtype), self.images.to(dtype)


class Reference:
    """A network with random weights and BatchNorm statistics, a few images, and the logits that float64 gives for them.

    Fresh statistics (mean 0, variance 1) would hide a BatchNorm that is left out or folded wrongly.
    """

    def __init__(self, net: str, side: int | None = None, seed: int = 0) -> None:
        self.net = net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = fastres.create_model(net, fused=False).eval()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    assert module.running_mean is not None and module.running_var is not None
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.8, 1.25)
                    nn.init.uniform_(module.weight, 0.8, 1.2)
                    nn.init.normal_(module.bias, 0, 0.1)
            channels, height, width = fastres.model_info(net).input_size
            self.images = torch.randn(DISTINCT, channels, side or height, side or width)
        self.model = model.requires_grad_(False).to(memory_format=torch.channels_last)

    @cached_property
    def truth(self) -> Tensor:
        with torch.inference_mode():
            return copy.deepcopy(self.model).double()(self.images.double()).clone()

    def problem(self, batch: int, dtype: str, with_truth: bool = True) -> Problem:
        """The images repeated up to ``batch`` in a mixed order, so that every logit of a batch can be checked.

        ``with_truth``: False where float64 would disturb what is measured; nothing passes parity then.
        """
        order = torch.arange(batch) % DISTINCT
        order = order[torch.randperm(batch, generator=torch.Generator().manual_seed(batch))]
        images = self.images[order].contiguous(memory_format=torch.channels_last)
        truth = self.truth[order] if with_truth else torch.empty(0, dtype=torch.float64)
        return Problem(self.net, dtype, self.model, images, truth)


def _import(name: str) -> Any:
    """An optional package.

    Raises:
        Unavailable: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise Unavailable("not installed")
    return importlib.import_module(name)


def _inference(function: Callable[[Tensor], Any], x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.inference_mode():
            return function(x)

    return call


def fastres_plan(problem: Problem) -> Call:
    """One call into C++ for the whole network; from float32 weights and images also in bf16, as OpenVINO."""
    x = problem.images
    return _inference(fastres.compile(problem.model, x, dtype=DTYPES[problem.dtype]), x)


@contextmanager
def _without_plans() -> Iterator[None]:
    before = os.environ.get("FASTRES_PLAN")
    os.environ["FASTRES_PLAN"] = "OFF"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTRES_PLAN"]
        else:
            os.environ["FASTRES_PLAN"] = before


def fastres_modules(problem: Problem) -> Call:
    """Fused layers called one by one from Python, with the plans that they would use by themselves turned off."""
    _, x = problem.prepared()
    fused = fastres.create_model(problem.net, fused=True).eval()
    fused.load_state_dict(problem.model.state_dict())
    fused = fused.to(x.dtype).to(memory_format=torch.channels_last)

    def call() -> Tensor:
        with torch.inference_mode(), _without_plans():
            return fused(x)

    return call


def eager(problem: Problem) -> Call:
    """Plain PyTorch, channels_last."""
    model, x = problem.prepared()
    return _inference(model, x)


def _compiled(problem: Problem, **options: Any) -> Call:
    from torch._inductor import config

    model, x = problem.prepared()
    call = _inference(torch.compile(model, dynamic=False, **options), x)
    # They matter while the network is compiled, which is in the first call. zentorch leaves its pass in the configuration,
    # where it would change what the others compile from then on: here it is put back.
    with config.patch(freezing=True, joint_custom_post_pass=None):
        call()
    return call


def compiled(problem: Problem) -> Call:
    """torch.compile with freezing: constants folded, BatchNorm included, and weights packed."""
    return _compiled(problem)


def compiled_max(problem: Problem) -> Call:
    """As :func:`compiled`, with the kernels found by trying (minutes a network)."""
    return _compiled(problem, mode="max-autotune")


def openvino(problem: Problem) -> Call:
    """OpenVINO's CPU plugin, one stream. It takes float32 images in planes and reads them where they are."""
    ov = _import("openvino")
    images = problem.images.contiguous()
    source = ov.convert_model(copy.deepcopy(problem.model), example_input=images)
    source.reshape(list(images.shape))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[problem.dtype],
    }  # fmt: skip
    request = ov.Core().compile_model(source, "CPU", settings).create_infer_request()
    array = images.numpy()

    def call() -> Tensor:
        return torch.from_numpy(request.infer([array], share_inputs=True, share_outputs=True)[0])

    return call


def onnxruntime(problem: Problem) -> Call:
    """ONNX Runtime's CPU provider with all graph optimizations."""
    if problem.dtype == "bf16":
        raise Unavailable("no bf16 convolution")
    ort = _import("onnxruntime")
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"{name}, which the export needs, is not installed")
    images = problem.images.contiguous()
    model = copy.deepcopy(problem.model).to(memory_format=torch.contiguous_format)
    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert program is not None
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    content = program.model_proto.SerializeToString()
    session = ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}

    def call() -> Tensor:
        return torch.from_numpy(session.run(None, feed)[0])

    return call


def zentorch(problem: Problem) -> Call:
    """AMD's backend of torch.compile."""
    _import("zentorch")
    return _compiled(problem, backend="zentorch")


PLAN = "fastres"
CONTENDERS: dict[str, Callable[[Problem], Call]] = {
    PLAN: fastres_plan, "fastres-modules": fastres_modules, "eager": eager, "compile": compiled,
    "compile-max": compiled_max, "openvino": openvino, "onnxruntime": onnxruntime, "zentorch": zentorch,
}  # fmt: skip
PEERS = tuple(name for name in CONTENDERS if not name.startswith(PLAN))
TITLES = {
    PLAN: "fastres plan", "fastres-modules": "fastres modules", "eager": "PyTorch eager", "compile": "torch.compile",
    "compile-max": "torch.compile max-autotune", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime",
    "zentorch": "zentorch",
}  # fmt: skip
