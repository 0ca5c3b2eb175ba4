"""A twin of a network: separate modules, the same parameters and buffers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import FusionError


def twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose modules are new objects but hold the original's ``_parameters`` and ``_buffers``.

    Because the dictionaries themselves are shared, whatever happens to a parameter or buffer of one network (an
    optimizer step, ``load_state_dict``, ``.to()``, a replaced parameter) has happened to the other. Modes, hooks and
    ordinary attributes are separate. Lists of modules and bound methods among the attributes point into the twin.
    Scripted parts can't be copied without their weights and are shared as a whole.

    Raises:
        FusionError: an attribute of the network can't be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module
            continue
        shared: list[Any] = [module._parameters, module._buffers]
        shared += [*module._parameters.values(), *module._buffers.values()]
        shared += [value for value in vars(module).values() if isinstance(value, Tensor)]
        shared.append(vars(module).get("process_group"))  # of synchronised BatchNorms
        memo.update({id(value): value for value in shared if value is not None})
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise FusionError(
            f"{type(model).__name__} can't be fused: one of its attributes can't be copied "
            f"({type(error).__name__}: {error})"
        ) from error
