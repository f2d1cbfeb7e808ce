"""What compact and regroup share: a masked copy to work on, and the check that what was made is the same function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..mask import Masks, mask_of
from ..prune import prunable
from .convert import convert, to_dense
from .units import Units
from .walk import Untraceable

__all__ = ["masked_copy", "prefixes", "replace", "rewired"]


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor] | None) -> tuple[nn.Module, Masks]:
    """A plain dense copy of a model with its pruned weights 0, and its masks; raises as :func:`convert` does."""
    if masks is None:
        masks = {name: mask_of(module) for name, module in prunable(model).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no weight survives")
        dense = to_dense(convert(model, masks, impl="dense"), inplace=True)
    return dense, {name: mask.detach().clone() for name, mask in masks.items()}


def rewired(original: nn.Module, inputs: Any, read: Callable[[Any, bool], Units], build: Callable[[Units, Any], Any]):
    """``build(read(inputs, …), inputs)`` when its ``model`` gives the outputs of ``original``, else None; and why not.

    ``inputs`` None stands for a batch that the model takes; ``read`` is told whether inputs were given.
    """
    problem = ""
    for given in [inputs] if inputs is not None else _guesses(original):
        try:
            units = read(given, inputs is not None)
        except Untraceable as error:
            problem = problem or str(error)
            continue
        result = build(units, given)
        problem = _differs(original, result.model, given)
        if not problem:
            return result, ""
    return None, problem


def prefixes(model: nn.Module) -> dict[int, list[str]]:
    """What the state dict's keys of each module begin with, by the module's id."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(f"{name}." if name else "")
    return found


def replace(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Give a module another parameter or buffer in place of one."""
    tensor, old = tensor.contiguous().clone(), getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, leaf, tensor)


def _guesses(model: nn.Module) -> list[Tensor]:
    """Inputs a model might take, by its first layer."""
    first = next((m for m in model.modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d)), None)
    if first is None:
        return [torch.zeros(2, 1)]
    like = {"device": first.weight.device, "dtype": first.weight.dtype}
    generator = torch.Generator().manual_seed(0)
    sides = [()] if isinstance(first, nn.Linear) else [
        (side,) * len(first.kernel_size) for side in (32, 28, 64, 8, 224, 16, 96, 128)
    ]  # fmt: skip
    inputs = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    sizes = [(inputs, *side) for side in sides]
    return [torch.randn(2, *size, generator=generator).to(**like) for size in sizes]


def _differs(original: nn.Module, made: nn.Module, inputs: Any) -> str:
    """Why two models are not the same function of these inputs; ``""`` when they are."""
    outputs = []
    for model in (original, made):
        model = copy.deepcopy(model).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                if isinstance(inputs, Mapping):
                    outputs.append(model(**inputs))
                else:
                    outputs.append(model(*inputs) if isinstance(inputs, tuple | list) else model(inputs))
            except RuntimeError as error:
                return f"the changed network fails ({str(error).splitlines()[0]})"
    wanted, got = (torch.utils._pytree.tree_leaves(output) for output in outputs)
    for one, other in zip(wanted, got, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            limit = 100 * torch.finfo(one.dtype).eps
            if one.shape != other.shape or not (one - other).norm() <= limit * one.norm().clamp(min=1e-6):
                return "the changed network does not give the same outputs"
    return ""
