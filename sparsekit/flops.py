"""Work beside weights: multiply-adds per layer, and the density they give, which early convolutions dominate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import call
from .prune import prunable

__all__ = ["flop_density", "positions"]


def positions(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """How often each prunable weight multiplies something in one forward pass of ``example_inputs``.

    ``{"conv1.weight": 784, "fc1.weight": 1}`` for one image of 28 x 28: output rows or pixels, over all calls.
    The model runs once, in eval mode, and is left as it was.
    """
    layers = prunable(model)
    counts = dict.fromkeys(layers, 0)

    def counter(names: list[str]):
        def count(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if isinstance(module, nn.Conv1d | nn.Conv2d) or hasattr(module, "out_channels"):
                rows = output.numel() // max(1, module.out_channels)
            else:
                x = args[0] if args else next(iter(kwargs.values()))
                rows = x.numel() // max(1, x.shape[-1])
            for name in names:
                counts[name] += rows

        return count

    watched: dict[nn.Module, list[str]] = {}
    for name, module in layers.items():
        watched.setdefault(module, []).append(name)
    for module in [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]:
        if names := watched.pop(module.out_proj, []):  # whose forward is never called
            watched.setdefault(module, []).extend(names)
    flags = {module: module.training for module in model.modules()}
    handles = [m.register_forward_hook(counter(names), with_kwargs=True) for m, names in watched.items()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags.items():
            module.training = flag
    return counts


def flop_density(masks: Mapping[str, Tensor], counts: Mapping[str, int]) -> float:
    """Share of the multiply-adds of the masked layers that survive; ``counts`` as :func:`positions` gives them."""
    total = sum(counts[name] * mask.numel() for name, mask in masks.items())
    return sum(counts[name] * int(mask.sum()) for name, mask in masks.items()) / total if total else 1.0
