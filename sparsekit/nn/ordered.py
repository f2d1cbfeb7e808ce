"""convert with regroup: the rows of the whole network in another order, where that measures faster."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..plan import NOISE, ModelPlan
from .capture import capture, on_gpu
from .convert import convert as _convert
from .order import keep_order
from .reorder import regroup as _regroup
from .whole import compare

__all__ = ["convert"]


def convert(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    training: bool = False,
    impl: str | Mapping[str, str] = "auto",
    inplace: bool = False,
    *,
    plan_seconds: float = 10.0,
    graph: bool = False,
    regroup: bool = False,
) -> nn.Module:
    """Replace the pruned layers of ``model`` by sparse ones, each in the format that measures fastest.

    Args:
        masks: ``{"0.weight": bool tensor}`` as :func:`sparsekit.prune` gives; None takes the masks of
            ``torch.nn.utils.prune``, or the zeros of each weight. Layers without a pruned weight stay.
        example_inputs: a tensor, or a tuple or dict of arguments, to run the model on once (in eval
            mode) so that each layer is measured on its real input. None assumes a batch of 64 rows
            for linear layers and 16 images of 32 x 32 for convolutions.
        training: measure forward + backward together; otherwise forward alone.
        impl: ``"auto"``, or the name of a format to force, or one per layer (``{"fc1": "csr"}``, the others
            ``"auto"``); a layer that a forced format cannot hold raises ValueError, and one that it has no
            kernel for on this device runs as a dense product, with a warning.
        inplace: change ``model`` itself; otherwise a deep copy.
        plan_seconds: what measuring may take. Layers that promise most go first, alike ones are measured once, and
            earlier measurements are taken from the disk cache; what is left unmeasured stays dense and says so.
        regroup: also plan the network with its rows in another order (:func:`sparsekit.regroup`: the same function,
            similar rows side by side), and take it where the whole measures faster; :func:`sparsekit.explain` says
            by how much, or why not. Each of the two orders has ``plan_seconds``. :func:`to_dense`, masks and saved
            files keep the original order; the state dict of a regrouped model (it holds ``regrouped``) loads into a
            model of the same order alone.
        graph: capture the converted model's inference on ``example_inputs`` as a CUDA graph, for these shapes only.

    Returns: the model with sparse layers; :func:`sparsekit.explain` says what was chosen and why.
    Raises: ValueError or TypeError naming the layer on bad masks, before anything changes; ValueError for regroup=True
    without example_inputs or with inplace=True.
    """
    how = {"training": training, "impl": impl, "plan_seconds": plan_seconds}
    if not regroup:
        return _convert(model, masks, example_inputs, inplace=inplace, graph=graph, **how)
    if example_inputs is None or inplace:
        raise ValueError("Expected regroup=True with example_inputs, to be measured on, and without inplace=True")
    if graph:
        on_gpu(model, example_inputs)
    natural = _convert(model, masks, example_inputs, **how)
    best = _faster(natural, model, masks, example_inputs, how)
    return capture(best, example_inputs) if graph else best


def _faster(natural: nn.Module, model: nn.Module, masks: Any, example_inputs: Any, how: dict[str, Any]) -> nn.Module:
    """The converted model, or its regrouped twin where that is faster; its plan says which and why."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same masks as before; why nothing moves is part of the plan
        grouping = _regroup(model, masks, example_inputs)
        moved = {layer.name for layer in grouping.layers if not layer.reason}
        other = _convert(grouping.model, grouping.masks, example_inputs, **how) if moved else None
    plan, note, chosen = ModelPlan.of(natural) or ModelPlan(), grouping.problem, natural
    if grouping.layers and not moved:
        note = "; ".join(sorted({layer.reason for layer in grouping.layers}))
    if other is not None:
        times = compare({"natural": natural, "regrouped": other}, example_inputs, how["training"])
        ratio = times["natural"] / times["regrouped"] if times else 1.0
        note = f"{ratio:.2f}x of its speed regrouped ({len(moved)} layers move)"
        if ratio > NOISE:
            chosen, us = other, None if plan.us is None else plan.us / ratio
            plan = replace(ModelPlan.of(other), us=us, dense_us=plan.dense_us, seconds=plan.seconds)
            keep_order(chosen, grouping.index)
            note = f"rows regrouped in {len(moved)} layers: {ratio:.2f}x of the natural order's speed"
    note = note if chosen is other else f"rows in their natural order: {note}"
    seconds = plan.seconds + time.perf_counter() - started
    replace(plan, note="; ".join(filter(None, (plan.note, note))), seconds=seconds).keep(chosen)
    return chosen
