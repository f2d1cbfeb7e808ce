"""Layer collapse: when pruning empties a layer while others still have weights (arXiv:2006.05467, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from torch import Tensor, nn

from .prune import prunable, prune

__all__ = ["Compression", "collapsed", "critical_compression"]


def collapsed(masks: Mapping[str, Tensor]) -> list[str]:
    """The layers without a survivor, where another layer has one; empty when all is well or all is gone."""
    empty = [name for name, mask in masks.items() if not bool(mask.any())]
    return empty if len(empty) < len(masks) else []


@dataclass(frozen=True)
class Compression:
    """``critical``: weights over survivors at the last count before a layer collapses; ``largest``: N / L."""

    critical: float
    largest: float


def critical_compression(model: nn.Module, criterion: Any = "magnitude", **how: Any) -> Compression:
    """How far a criterion can compress ``model`` before it empties a layer.

    Other arguments as in :func:`sparsekit.prune`. ``largest`` is reached when one weight of each of L layers is
    left; an algorithm with ``critical == largest`` satisfies "maximal critical compression" (arXiv:2006.05467,
    section 3). Found by bisection over the number of survivors, so about ``log2(N)`` prunings.
    """
    layers = prunable(model, how.get("exclude", ()))
    total = sum(module.weight.numel() for module in layers.values())

    def survives(keep: int) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of emptied layers, which are looked for
            masks = prune(model, 1 - keep / total, criterion=criterion, **{"scope": "global"} | how)
        return all(bool(mask.any()) for mask in masks.values())

    low, high = len(layers), total  # the least that could do, and what surely does
    if survives(low):
        high = low
    while high - low > max(1, low // 1000):
        middle = max(low + 1, min(high - 1, round((low * high) ** 0.5) if log(high / low) > 0.1 else (low + high) // 2))
        low, high = (low, middle) if survives(middle) else (middle, high)
    return Compression(total / high, total / len(layers))
