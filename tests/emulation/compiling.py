"""Compiles a Triton launch ahead of time for any NVIDIA architecture, specialised exactly as the JIT would, without a GPU.

    compiled = compile_launch(launch, 90)
    compiled.asm["ptx"], compiled.metadata.shared, compiled.metadata.num_warps

Only dtypes, alignment and integer values of the arguments matter: tensors may be on the CPU, fake or meta.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastres.kernels.common.triton_launch import Launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


class _Stand:
    """A tensor as the specialisation sees it: a dtype and an address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.address = address_of(tensor)

    def data_ptr(self) -> int:
        return self.address

    @staticmethod
    def ptr_range() -> int:
        return 0


def address_of(tensor: torch.Tensor) -> int:
    """The data pointer; of a tensor without memory, its offset in an aligned storage."""
    from torch._subclasses import FakeTensor

    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()


def jit_function(kernel: Any) -> JITFunction:
    """The JIT function under decorators (autotuner, heuristics)."""
    while not isinstance(kernel, JITFunction):
        if not hasattr(kernel, "fn"):
            raise TypeError(f"{kernel} is no @triton.jit function (was triton imported with TRITON_INTERPRET=1?)")
        kernel = kernel.fn
    return kernel


_binders: dict[tuple[int, int], Any] = {}
_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


def specialise(launch: Launch, arch: int) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any], Any]:
    """Signature, constants, attributes (divisibility) and options, by Triton's own rules."""
    kernel, backend = jit_function(launch.kernel), make_backend(GPUTarget("cuda", arch, 32))
    key = (id(kernel), arch)
    if key not in _binders:
        _binders[key] = create_function_from_signature(kernel.signature, kernel.params, backend)
    values = {k: _Stand(v) if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
    keywords = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "debug": False,
        "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
    }
    bound, specialisation, _ = _binders[key](**values, **launch.constants, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialisation, keywords)
    return signature, constants, attributes, options


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """The compiled kernel: ``asm`` (ttir, ttgir, llir, ptx, cubin) and ``metadata``. Repeated calls are cheap."""
    kernel = jit_function(launch.kernel)
    signature, constants, attributes, options = specialise(launch, arch)
    key = (kernel.cache_key, arch, repr(signature), repr(constants), repr(attributes), repr(options))
    if key not in _compiled:
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", arch, 32)
        _compiled[key] = triton.compile(source, target=target, options=options.__dict__)
    return _compiled[key]
