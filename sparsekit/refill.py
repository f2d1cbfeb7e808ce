"""Refill: an unstructured ticket turned into a structured one of the same density, by surviving magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .mask import Masks, check_masks
from .pattern import Pattern

__all__ = ["refill"]


def refill(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], pattern: str | Pattern) -> Masks:
    """Masks of ``pattern`` that keep, layer by layer, the groups with the most surviving magnitude.

    Lossy: what survived outside the chosen groups goes, and what was pruned inside them comes back. After
    :func:`sparsekit.regroup` rows that survive in the same columns lie in one group, which loses less. Rewind
    and train again.

    Args:
        weights: trained dense weights by name, a state dict for one; they may hold more than the masks name.
        masks: bool tensors, ``{"0.weight": mask}``.
        pattern: ``"block:8x1"`` and other blocks, ``"channel"``, or ``"N:M"``, which fixes the density itself.

    Returns: masks with as many survivors per layer, or as near as whole groups allow and at least one group.
    Ties go by index. Raises: ValueError or TypeError naming the layer on bad masks or weights.
    """
    pattern = Pattern.parse(pattern)
    if missing := [name for name in masks if name not in weights]:
        raise ValueError(f"{missing[0]}: Expected a weight for every mask, got none")
    check_masks(masks, {name: weights[name].shape for name in masks})
    filled = {}
    for name, mask in masks.items():
        weight = weights[name].detach().to(mask.device)
        if not weight.is_floating_point() or bool(weight.isnan().any()):
            raise ValueError(f"{name}: Expected floating-point weights without NaN, got {weight.dtype}")
        everything = torch.ones_like(mask)
        scores = weight.abs().double().masked_fill(~mask, 0)
        if pattern.nm:
            filled[name] = pattern.nm_mask(scores, everything)
        else:
            filled[name] = _best_groups(scores, int(mask.sum()), everything, pattern)
    return filled


def _best_groups(scores: Tensor, survivors: int, everything: Tensor, pattern: Pattern) -> Tensor:
    """The groups of highest mean score whose sizes add up to ``survivors``, or as near as they can."""
    totals, _ = pattern.group_scores(scores, everything)
    sizes, _ = pattern.group_scores(torch.ones_like(scores), everything)
    keep = torch.zeros_like(totals, dtype=torch.bool)
    if survivors:
        order = (totals / sizes).argsort(descending=True, stable=True)
        size = sizes[order].cumsum(0)
        count = int((size <= survivors).sum())
        if count < order.numel() and (count == 0 or size[count] - survivors < survivors - size[count - 1]):
            count += 1
        keep[order[:count]] = True
    return pattern.expand(keep, scores.shape)
