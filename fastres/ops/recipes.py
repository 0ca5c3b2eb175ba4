"""Recipes: how to rebuild an activation from raw tensors that are saved for backward anyway.

A block that ends in ``relu(bn(y) + bn(shortcut))`` saves ``y`` and the shortcut's raw output; its result need not be
saved as well when the next convolutions can rebuild it in one pointwise pass. The op that makes such a result attaches
a recipe to it, and the ops that would save it for backward save the recipe's tensors instead. They go through
``ctx.save_for_backward`` like any other, so hooks, version checks and memory accounting see them. That trades a pass over
maps for memory; backends whose steps are bound by such passes attach none.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ATTRIBUTE = "_fastres_recipe"
# Memory traffic bounds a step on a GPU: what these backends made is kept, since a pass that rebuilds it moves three maps.
KEEPING = ("triton", "cuda")


class Recipe(NamedTuple):
    """``rebuild(*tensors)`` gives the tensor the recipe is attached to, bit for bit."""

    rebuild: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    version: int  # of the tensor when the recipe was attached; an in-place change makes the recipe void


def attach(backend: str, out: Tensor, rebuild: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Attaches a recipe to ``out``, which ``backend`` made, if a backward pass may need it. Compiled graphs plan their memory
    themselves."""
    if backend in KEEPING or torch.compiler.is_compiling() or not out.requires_grad:
        return out
    setattr(out, _ATTRIBUTE, Recipe(rebuild, tuple(t.detach() for t in tensors), out._version))
    return out


def hand_on(x: Tensor, view: Tensor) -> Tensor:
    """Gives ``view``, which holds the same values, the recipe of ``x``; they share the version that makes it void."""
    if hasattr(x, _ATTRIBUTE):
        setattr(view, _ATTRIBUTE, getattr(x, _ATTRIBUTE))
    return view


def drop(out: Tensor) -> Tensor:
    """Removes the recipe of ``out``: its tensors are not kept for backward after all."""
    if hasattr(out, _ATTRIBUTE):
        delattr(out, _ATTRIBUTE)
    return out


def saved_form(x: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Tensor] | None]:
    """(tensors to save, how to rebuild ``x`` from them); ``((x,), None)`` for a tensor without a valid recipe."""
    recipe = getattr(x, _ATTRIBUTE, None)
    if recipe is None or recipe.version != x._version:
        return (x,), None
    return recipe.tensors, recipe.rebuild
