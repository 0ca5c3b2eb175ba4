"""Runs launches under Triton's interpreter, per call, in a process that imported triton for compiling.

    with executing_with(interpreter := interpreter_executor()):
        ...                                     # launches run on CPU tensors, in place
    interpreter.record[0].loaded["x"]           # bytes, by launch and argument

Right bfloat16 (kernels/common/triton_interpreter.py), TF32 operands cut as the tensor cores cut them, every load and store
checked against the launch's tensors, double stores and races between programs found, bytes counted. A masked lane without
``other`` is undefined on a GPU: here it reads NaN (integers: a large odd pattern). Afterwards the process is as before.
"""

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from emulation.errors import EmulationError
from emulation.memory import GuardedMemory, Traffic
from fastres.kernels.common.triton_interpreter import Builder, Handle, repaired, replaced
from fastres.kernels.common.triton_launch import Launch


@dataclass(frozen=True)
class Record:
    """What one launch moved: bytes by argument name, as in :class:`emulation.memory.Traffic`."""

    name: str
    grid: tuple[int, ...]
    constants: Mapping[str, Any]
    loaded: dict[str, int]
    stored: dict[str, int]
    unique_loaded: dict[str, int]
    unique_stored: dict[str, int]


class _Rewriter(interpreter.FunctionRewriter):
    """Rewrites a kernel as the interpreter needs it, and leaves the module that it comes from as it is."""

    def _compile_and_exec(self, tree: ast.AST) -> Callable[..., Any]:
        outer = ast.parse("def bind(interpreter_semantic): return None")
        function = outer.body[0]
        assert isinstance(tree, ast.Module) and isinstance(function, ast.FunctionDef)
        function.body = [*tree.body, ast.parse(f"return {self.fn.__name__}").body[0]]
        ast.fix_missing_locations(outer)
        namespace: dict[str, Any] = {}
        exec(compile(outer, self.filename, "exec"), self.fn.__globals__, namespace)
        return namespace["bind"](interpreter.interpreter_semantic)


_rewritten: dict[Any, Callable[..., Any]] = {}


def _python(function: Any) -> Callable[..., Any]:
    """The Python function that interprets a @triton.jit function."""
    while not inspect.isfunction(function):
        function = function.fn
    if function not in _rewritten:
        _rewritten[function] = _Rewriter(function).rewrite_ast()
    return _rewritten[function]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _python(self)(*args, **kwargs)


def truncate_tf32(values: np.ndarray) -> np.ndarray:
    """What a tensor core sees of a float32 operand in a TF32 product: 10 bits of mantissa, the rest ignored."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _poison(shape: tuple[int, ...], dtype: Any) -> Any:
    kind = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        value: Any = 0x7FC0
    elif kind.kind == "f":
        value = np.nan
    else:
        value = True if kind.kind == "b" else np.iinfo(kind).max // 3 * 2 + 1
    return Handle(np.full(shape, value, kind), dtype)


def _element_size(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _lanes(pointers: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of the unmasked lanes, and the mask as an array of the pointers' shape."""
    flags = np.broadcast_to(mask.data if isinstance(mask, Handle) else mask, pointers.data.shape)
    return pointers.data[flags].view(np.int64), flags


class InterpreterExecutor:
    """An executor for ``executing_with``; ``record`` has an entry a launch."""

    def __init__(self, check_stores: bool = True, poison_masked: bool = True, truncate: bool = True) -> None:
        self.check_stores, self.poison_masked, self.truncate = check_stores, poison_masked, truncate
        self.record: list[Record] = []
        self._memory = GuardedMemory({})

    def __call__(self, launch: Launch) -> None:
        self._memory = GuardedMemory(launch.arguments, self.check_stores)
        function = _python(launch.kernel)
        grid = tuple(launch.grid) + (1,) * (3 - len(launch.grid))
        with self._interpreting(), np.errstate(all="ignore"):
            bound = inspect.getcallargs(function, **launch.arguments, **launch.constants)
            values = {
                name: value if name in launch.constants else interpreter._implicit_cvt(value)
                for name, value in bound.items()
            }
            builder = interpreter.interpreter_builder
            builder.set_grid_dim(*grid)
            for number, (z, y, x) in enumerate(product(*(range(n) for n in reversed(grid)))):
                builder.set_grid_idx(x, y, z)
                self._memory.program = number
                try:
                    function(**values)
                except EmulationError as error:
                    raise type(error)(f"{launch.name}: {error}") from error
        traffic: Traffic = self._memory.traffic()
        self.record.append(Record(launch.name, launch.grid, dict(launch.constants), **vars(traffic)))

    @contextmanager
    def _interpreting(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(repaired())
            stack.enter_context(replaced(self._hooks()))
            # Patched once a launch, in place of once a call of every helper as upstream does.
            scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            stack.callback(scope.restore)
            yield

    def _hooks(self) -> list[tuple[Any, str, Any]]:
        memory, poison_masked, truncate = self._memory, self.poison_masked, self.truncate
        load, store, dot = Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot
        rmw, cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

        def masked_load(
            self: Any, pointers: Any, mask: Any, other: Any, cache_modifier: Any, eviction_policy: Any, is_volatile: Any
        ) -> Any:
            addresses, flags = _lanes(pointers, mask)
            memory.load(addresses, _element_size(pointers))
            if other is None and poison_masked and len(addresses) < flags.size:
                other = _poison(pointers.data.shape, pointers.get_element_ty())
            flags = Handle(flags, tl.int1)
            return load(self, pointers, flags, other, cache_modifier, eviction_policy, is_volatile)

        def masked_store(self: Any, pointers: Any, value: Any, mask: Any, cache: Any, eviction: Any) -> Any:
            addresses, flags = _lanes(pointers, mask)
            stored = np.broadcast_to(value.data, flags.shape)
            memory.store(addresses, _element_size(pointers), stored[flags])
            return store(self, pointers, Handle(stored, value.dtype), Handle(flags, tl.int1), cache, eviction)

        def atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
            memory.atomic(_lanes(pointers, mask)[0], _element_size(pointers))
            return rmw(self, op, pointers, value, mask, sem, scope)

        def atomic_cas(self: Any, pointers: Any, compare: Any, value: Any, sem: Any, scope: Any) -> Any:
            memory.atomic(_lanes(pointers, True)[0], _element_size(pointers))
            return cas(self, pointers, compare, value, sem, scope)

        def product_of(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
            if truncate and a.dtype.scalar == tl.float32 and str(precision).upper().endswith("TF32"):
                a, b = Handle(truncate_tf32(a.data), a.dtype), Handle(truncate_tf32(b.data), b.dtype)
            return dot(self, a, b, d, precision, imprecise)

        return [
            (Builder, "create_masked_load", masked_load),
            (Builder, "create_masked_store", masked_store),
            (Builder, "create_atomic_rmw", atomic_rmw),
            (Builder, "create_atomic_cas", atomic_cas),
            (Builder, "create_dot", product_of),
            (JITFunction, "__call__", _call),
            (interpreter.InterpretedFunction, "__call__", _call),
        ]


def interpreter_executor(
    check_stores: bool = True, poison_masked: bool = True, truncate: bool = True
) -> InterpreterExecutor:
    """check_stores: find double stores and races between programs. poison_masked: NaN in masked lanes without ``other``.
    truncate: TF32 products see truncated operands (False: exact float32)."""
    return InterpreterExecutor(check_stores, poison_masked, truncate)
