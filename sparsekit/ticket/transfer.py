"""Transfer: a ticket found on one task, trained on another (Morcos et al., arXiv:1906.02773).

Body and mask go over by name; what does not fit, a head for other classes or a first layer for other inputs,
stays as the new model has it, dense.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..mask import Masks
from ..pattern import Pattern
from ..prune import prunable
from .controls import random_masks

__all__ = ["Transfer", "transfer"]


@dataclass
class Transfer:
    """``model`` with the ticket's weights, dense, and its ``masks``; ``fresh`` names what stayed the model's own."""

    model: nn.Module
    masks: Masks
    fresh: list[str]

    def random(self, seed: int, pattern: str | Pattern = "unstructured") -> Masks:
        """The baseline: masks as dense in every layer, drawn at random."""
        return random_masks(self.masks, torch.Generator().manual_seed(seed), pattern)


def transfer(
    state: Mapping[str, Tensor] | nn.Module,
    masks: Mapping[str, Tensor],
    model: nn.Module,
    *,
    exclude: Iterable[str] = (),
    rename: Mapping[str, str] | None = None,
) -> Transfer:
    """Move weights and masks of a ticket into ``model``, which is not changed.

    Args:
        state: dense weights to start from, a state dict or module: those of the rewind point, of the
            initialisation, or pre-trained ones. Buffers such as batch-norm statistics go over with them.
        masks: ``{"fc1.weight": bool tensor}`` of the ticket.
        model: another architecture is fine as long as some masked layer has its name and shape.
        exclude: fnmatch patterns of parameters or modules that stay the new model's own (``"fc3"``, ``"head.*"``).
        rename: prefixes of the source to prefixes of ``model`` (``{"encoder.": "backbone."}``, ``{"": "net."}``),
            the longest that fits.

    Returns: :class:`Transfer`; train ``sparsekit.convert(found.model, found.masks, training=True)``.
    Raises: ValueError when no masked layer goes over, or a pattern or prefix fits nothing.
    """
    state = state.state_dict() if isinstance(state, nn.Module) else state
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    own = model.state_dict()
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in own):
            raise ValueError(f"Expected exclude to name parameters of the new model, got {pattern!r}")
    for prefix in rename or ():
        if not any(name.startswith(prefix) for name in state):
            raise ValueError(f"Expected rename to name prefixes of the ticket's parameters, got {prefix!r}")
    target = {name: _renamed(name, rename or {}) for name in {**state, **masks}}
    moved = {
        target[name]: tensor
        for name, tensor in state.items()
        if target[name] in own
        and own[target[name]].shape == tensor.shape
        and not any(_matches(target[name], pattern) for pattern in patterns)
    }
    layers = prunable(model)
    kept = {target[name]: mask for name, mask in masks.items() if target[name] in layers and target[name] in moved}
    if not kept:
        raise ValueError(
            f"Expected a masked layer of the ticket ({', '.join(masks) or 'none'}) with its name and shape in the new"
            f" model ({', '.join(layers) or 'none'}), got none; see rename="
        )
    for name, mask in kept.items():
        if mask.shape != own[name].shape:
            raise ValueError(f"{name}: Expected a mask of shape {list(own[name].shape)}, got {list(mask.shape)}")
    new = copy.deepcopy(model)
    new.load_state_dict({**own, **moved})
    parameters = {name for name, _ in new.named_parameters()}
    return Transfer(new, {name: mask.clone() for name, mask in kept.items()}, sorted(parameters - moved.keys()))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    fits = [prefix for prefix in rename if name.startswith(prefix)]
    if not fits:
        return name
    prefix = max(fits, key=len)
    return rename[prefix] + name.removeprefix(prefix)
