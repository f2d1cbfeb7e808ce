"""The refill round: the last unstructured ticket turned into a structured one, and trained again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..mask import Masks
from ..models import output_layer
from ..nn import regroup
from ..pattern import Pattern
from ..refill import refill
from .rewind import Snapshot

__all__ = ["Refilled", "check_refill", "refilled"]

Order = dict[str, tuple[Tensor, ...]]


class Refilled(NamedTuple):
    """A dense ``model`` with the trained weights in the regrouped ``order``, its structured ``masks``, the ``point`` to
    rewind to in that order, and ``facts`` for the ledger."""

    model: nn.Module
    masks: Masks
    point: Snapshot
    order: Order
    facts: dict[str, Any]


def check_refill(text: str | None, pattern: Pattern, rounds: int) -> Pattern | None:
    """The pattern to refill with, or None; raises ValueError on one that keeps no density, or nothing to refill."""
    if text is None:
        return None
    found = Pattern.parse(text)
    if found.nm or found.name == "unstructured":
        raise ValueError(f"Expected refill as a pattern of blocks or 'channel', which keep the density, got {text!r}")
    if pattern.name != "unstructured" or rounds < 1:
        got = f"pattern {pattern.name!r} and {rounds} rounds"
        raise ValueError(f"Expected an unstructured search of at least one round to refill, got {got}")
    return found


def refilled(model: nn.Module, masks: Masks, pattern: Pattern, point: Snapshot, example_inputs: Any) -> Refilled:
    """Regroup the rows of a trained ``model`` under ``masks``, then refill its layers with ``pattern``.

    The output layer, whose rows are classes, keeps its mask. Nothing is measured or drawn: equal calls give equal
    results, so a search that was interrupted goes on as it would have.
    """
    order: Order = {}
    if pattern.group[0] > 1:
        grouping = regroup(model, masks, example_inputs, pattern.group[0])
        model, masks, order = grouping.model, dict(grouping.masks), grouping.index
    last = output_layer(model)
    before = {name: mask for name, mask in masks.items() if name != last}
    after = refill(model.state_dict(), before, pattern)
    survivors = sum(int(mask.sum()) for mask in before.values())
    kept = sum(int((before[name] & mask).sum()) for name, mask in after.items())
    facts = {"pattern": str(pattern), "kept": kept / max(1, survivors), "regrouped": sorted(order)}
    return Refilled(copy.deepcopy(model), masks | after, _moved(point, order), order, facts)


def _moved(point: Snapshot, order: Order) -> Snapshot:
    """A snapshot in another order of rows; what the optimizer keeps of a weight moves with it."""

    def state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _move(tensor, tensor.shape, order.get(name)) for name, tensor in tensors.items()}

    optimizer = point.optimizer
    if optimizer is not None:
        moments = {
            name: {key: _move(value, point.model[name].shape, order.get(name)) for key, value in own.items()}
            for name, own in optimizer["state"].items()
        }
        optimizer = optimizer | {"state": moments}
    return replace(point, model=state(point.model), optimizer=optimizer)


def _move(value: Any, shape: torch.Size, index: tuple[Tensor, ...] | None) -> Any:
    if index is None or not isinstance(value, Tensor) or value.shape != shape:
        return value
    return value[tuple(part.to(value.device) for part in index)]
