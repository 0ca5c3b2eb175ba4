"""Turns a rewritten graph into the forward of a class, in a form that can be copied and pickled."""

import builtins
import importlib
import inspect
import linecache
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from fastres.inference.automatic import planned

_numbers = count()
_BUILTIN = {"inf": math.inf, "nan": math.nan, "NoneType": type(None), "torch": torch, "device": torch.device}


@dataclass(frozen=True)
class Program:
    """Source of a function ``forward(self, …)`` and what its names mean."""

    source: str
    names: dict[str, Any]

    @classmethod
    def of(cls, graph: fx.Graph) -> "Program":
        code = graph.python_code(root_module="self")
        return cls(code.src.strip() + "\n", dict(code.globals))

    def compile(self) -> Callable[..., Any]:
        """The function; tracebacks through it show the source."""
        file = f"<fastres fused forward {next(_numbers)}>"
        scope: dict[str, Any] = {"__builtins__": builtins, "__name__": __name__, **_BUILTIN, **self.names}
        exec(compile(self.source, file, "exec"), scope)
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        return scope["forward"]

    def __getstate__(self) -> dict[str, Any]:
        names = {k: _Import(v.__name__) if isinstance(v, ModuleType) else v for k, v in self.names.items()}
        return {"source": self.source, "names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {k: importlib.import_module(v.name) if isinstance(v, _Import) else v for k, v in state["names"].items()}
        self.__dict__.update(source=state["source"], names=names)


@dataclass(frozen=True)
class _Import:
    name: str


class FusedNetwork(nn.Module):
    """Mixed into the class of a network by ``fastres.fuse``; everything but ``forward`` is the network's own.

    ``fusion_report`` says what was fused; ``code`` is the source of the new forward.
    """

    _fastres_base: type[nn.Module]
    _fastres_programs: tuple[Program, ...]
    fusion_report: Any

    @property
    def code(self) -> str:
        return "\n".join(program.source for program in self._fastres_programs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self._fastres_base, self._fastres_programs), self.__dict__


def fused_class(base: type[nn.Module], programs: tuple[Program, ...]) -> type[FusedNetwork]:
    """A subclass of ``base`` whose forward is the program; with two programs, those of training and evaluation."""
    in_training = programs[0].compile()
    in_evaluation = in_training if len(programs) == 1 else programs[1].compile()

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and (result := planned(self, args[0])) is not None:
            return result
        return (in_training if self.training else in_evaluation)(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(in_training)  # type: ignore[attr-defined]
    bases = (FusedNetwork,) if base is nn.Module else (FusedNetwork, base)
    body = {"forward": forward, "_fastres_base": base, "_fastres_programs": programs, "__module__": __name__}
    body["__doc__"] = f"{base.__name__} with fused layers."
    return type(f"Fused{base.__name__}", bases, body)


def _blank(base: type[nn.Module], programs: tuple[Program, ...]) -> FusedNetwork:
    """An empty instance; copying and unpickling fill in its ``__dict__``."""
    cls = fused_class(base, programs)
    return cls.__new__(cls)
