"""How alike masks are, and how far weights have come from where they began."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .mask import Masks

__all__ = ["hamming", "jaccard", "movement", "overlap", "shared"]


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Survivors of both masks over survivors of either, in [0, 1]; 1.0 where neither has any.

    Raises: ValueError unless both name the same weights, of the same shapes.
    """
    _check(a, b)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return sum(int((a[name] & b[name]).sum()) for name in a) / either if either else 1.0


def hamming(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Share of the positions at which two masks differ, in [0, 1]."""
    _check(a, b)
    total = sum(mask.numel() for mask in a.values())
    return sum(int((a[name] ^ b[name]).sum()) for name in a) / total if total else 0.0


def overlap(masks: Mapping[str, Masks]) -> Tensor:
    """Jaccard overlap of each two of ``{"seed 0": masks, …}``, float64 ``[n, n]``, in the order given.

    Two random masks of density d overlap by d / (2 - d): compare with that.
    """
    everyone = list(masks.values())
    return torch.tensor([[jaccard(a, b) for b in everyone] for a in everyone], dtype=torch.float64)


def shared(masks: Mapping[str, Masks]) -> float:
    """Share of the first mask's survivors that every mask keeps (arXiv:2302.11244, section 5)."""
    first, *others = masks.values()
    for other in others:
        _check(first, other)
    kept = sum(int(torch.stack([m[name] for m in masks.values()]).all(0).sum()) for name in first)
    return kept / max(1, sum(int(mask.sum()) for mask in first.values()))


def movement(
    model: nn.Module | Mapping[str, Tensor], start: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """How far training moved each layer's survivors from ``start``; models or dense state dicts.

    ``{"fc1.weight": {"distance": ‖w - w0‖, "relative": that over ‖w0‖, "cosine": w·w0 over both norms,
    "turned": share of signs that turned}}``.
    """
    model = model.state_dict() if isinstance(model, nn.Module) else model
    start = start.state_dict() if isinstance(start, nn.Module) else start
    found = {}
    for name, mask in masks.items():
        for state in (model, start):
            if name not in state or state[name].shape != mask.shape:
                got = list(state[name].shape) if name in state else "none"
                raise ValueError(f"{name}: Expected a dense weight of shape {list(mask.shape)}, got {got}")
        w, w0 = (state[name].detach().to(mask.device)[mask].double() for state in (model, start))
        norm, norm0 = float(w.norm()), float(w0.norm())
        distance = float((w - w0).norm())
        found[name] = {
            "distance": distance,
            "relative": distance / norm0 if norm0 else 0.0,
            "cosine": float(w @ w0) / (norm * norm0) if norm and norm0 else 0.0,
            "turned": float((w * w0 < 0).double().mean()) if w.numel() else 0.0,
        }
    return found


def _check(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"Expected masks of the same weights, got {sorted(a.keys() ^ b.keys())} in one of them only")
    for name in a:
        if a[name].shape != b[name].shape:
            got = f"{list(a[name].shape)} and {list(b[name].shape)}"
            raise ValueError(f"{name}: Expected masks of one shape, got {got}")
