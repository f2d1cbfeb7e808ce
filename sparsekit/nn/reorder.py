"""regroup: rows of a network put in another order, exactly, so that similar ones lie side by side."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..mask import Masks
from ..panels import panel_union, row_order
from .convert import to_dense
from .order import layers_of, moves
from .rewiring import masked_copy, prefixes, replace, rewired
from .units import Layer, Units
from .walk import read_units

__all__ = ["Regrouped", "Regrouping", "regroup"]


@dataclass(frozen=True)
class Regrouped:
    """One layer's share of columns read by a panel of rows, before and after; ``reason`` says why it kept its order."""

    name: str
    before: float
    after: float
    reason: str = ""


@dataclass
class Regrouping:
    """What :func:`regroup` returns.

    ``model`` is a plain copy of the network with rows in a better order and ``masks`` are its masks; ``layers``
    says what was gained, ``note`` how the graph was read, ``problem`` why nothing could be (else ``""``). ``str()``
    gives the table. :meth:`permute` brings another network of the architecture into this order (the weights to rewind
    to), :meth:`restore` back.
    """

    model: nn.Module
    masks: Masks
    layers: tuple[Regrouped, ...] = ()
    problem: str = ""
    note: str = ""
    index: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Per entry of the state dict where each of its elements comes from; entries without one keep their order."""

    def permute(self, model: nn.Module) -> nn.Module:
        """A copy of a dense network of the original architecture in the new order."""
        return self._moved(model, lambda tensor, index: tensor[index].clone())

    def restore(self, model: nn.Module | None = None) -> nn.Module:
        """A dense copy of :attr:`model` (default), trained on or converted, in the original order, bit for bit."""
        return self._moved(
            self.model if model is None else model,
            lambda tensor, index: torch.empty_like(tensor).index_put_(index, tensor),
        )

    def _moved(self, model: nn.Module, move) -> nn.Module:
        model = to_dense(model)
        state = model.state_dict()
        for name, index in self.index.items():
            extent = tuple(i.numel() for i in index)
            if name not in state or state[name].shape[: len(index)] != extent:
                got = list(state[name].shape) if name in state else "none"
                raise ValueError(f"{name}: Expected a tensor of {' x '.join(map(str, extent))}, got {got}")
        with torch.no_grad():
            for tensor, index in moves(state.items(), layers_of(self.index)):
                tensor.copy_(move(tensor.clone(), index))
        return model

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        lines = [
            (
                layer.name,
                f"{layer.before:.3f} -> {layer.after:.3f}",
                layer.reason or f"{layer.after / layer.before - 1:+.0%}",
            )
            for layer in self.layers
        ]
        lines = [("layer", "columns read by a panel", "gain, or why not"), *lines]
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        table = [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c}" for a, b, c in lines]
        return "\n".join([*table, self.note] if self.note else table)


def regroup(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    rows: int = 8,
) -> Regrouping:
    """Order the rows of every layer so that panels of ``rows`` outputs share columns; the same function, exactly.

    The order of a layer's outputs is folded into whatever reads them (the next layer's columns, batch norms, the
    other layers of a residual sum). Outputs of the model, and units that ``torch.fx`` (or ``torch.export``) does not
    see through, keep their order, and so does a layer that greedy clustering (:func:`sparsekit.panels.row_order`) does
    not help.

    Args: ``masks`` and ``example_inputs`` as in :func:`sparsekit.compact`; ``rows`` is 8 or 16, the height of the
    panels or vectors to come. Raises: ValueError or TypeError naming the layer on bad arguments.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 2:
        raise ValueError(f"Expected rows as a whole number of at least 2, got {rows!r}")
    original, masks = masked_copy(model, masks)
    result, problem = rewired(
        original,
        example_inputs,
        lambda inputs, given: read_units(original, masks, inputs, (False, True), given),
        lambda units, _: _reorder(original, masks, units, rows),
    )
    if result is None:
        problem = f"no row is moved, {problem}"
        warnings.warn(f"regroup: {problem}", stacklevel=2)
        return Regrouping(copy.deepcopy(original), masks, (), problem)
    return result


def _reorder(original: nn.Module, masks: Masks, units: Units, rows: int) -> Regrouping:
    model = copy.deepcopy(original)
    orders = {id(layer): [np.arange(len(ids)) for ids in (layer.outs, layer.ins)] for layer in units.layers.values()}
    spaces: dict[bytes, list[Layer]] = {}
    for layer in units.layers.values():
        mask = masks.get(_key(layer))
        if mask is not None and not bool(mask.all()):
            spaces.setdefault(units.classes[layer.outs].tobytes(), []).append(layer)
    lines = {}
    for layers in spaces.values():
        joint = torch.cat([masks[_key(layer)].flatten(1).cpu() for layer in layers], 1)
        reason, order = _fixed(units, layers[0]), torch.arange(joint.shape[0])
        if not reason:
            order = row_order(joint, rows)
            if panel_union(joint[order], rows) >= panel_union(joint, rows):
                reason = "natural order is as good"
        if not reason:
            _move(units, orders, units.classes[layers[0].outs], order.numpy())
        for layer in layers:
            own = masks[_key(layer)]
            old = panel_union(own, rows)
            new = old if reason else panel_union(own[order.to(own.device)], rows)
            lines[layer.name] = Regrouped(layer.name or type(layer.module).__name__, old, new, reason)
    result = Regrouping(model, dict(masks), tuple(lines.values()), note=units.note)
    copies, names = dict(zip(map(id, original.modules()), model.modules(), strict=True)), prefixes(original)
    for layer in units.layers.values():
        index = [torch.from_numpy(order) for order in orders[id(layer)]]
        if all(torch.equal(i, torch.arange(i.numel())) for i in index):
            continue
        module = copies[id(layer.module)]
        leaves = {"weight": (index[0][:, None], index[1][None])} if layer.alive is not None else {}
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(getattr(module, leaf, None), Tensor):
                own = leaves.setdefault(leaf, (index[0],))
                tensor = getattr(module, leaf).detach()
                replace(module, leaf, tensor[tuple(i.to(tensor.device) for i in own)])
                result.index |= {prefix + leaf: own for prefix in names[id(layer.module)]}
        if (key := _key(layer)) in masks:
            result.masks[key] = masks[key][tuple(i.to(masks[key].device) for i in leaves["weight"])]
    return result


def _key(layer: Layer) -> str:
    return f"{layer.name}.weight" if layer.name else "weight"


def _fixed(units: Units, layer: Layer) -> str:
    """Why the rows of a layer cannot move; ``""`` when they can."""
    own = units.classes[layer.outs]
    if reason := next((units.reasons[int(name)] for name in own if int(name) in units.reasons), ""):
        return reason
    if len(np.unique(own)) < len(own):
        return "some rows are tied to each other"
    for other in units.layers.values():
        for ids in (other.outs, other.ins):
            times = np.bincount(units.classes[ids], minlength=units.count)[own]
            if times.any() and other.groups != 1:
                return f"{other.name} is a grouped convolution"
            if times.min() != times.max():
                return f"{other.name} has only some of the rows"
    return ""


def _move(units: Units, orders: dict[int, list[np.ndarray]], own: np.ndarray, order: np.ndarray) -> None:
    """Wherever a class of ``own`` stands, let the one that takes its place stand, in all layers alike."""
    rank = np.full(units.count, -1)
    rank[own] = np.arange(len(own))
    for layer in units.layers.values():
        for side, ids in enumerate((layer.outs, layer.ins)):
            ranks = rank[units.classes[ids]]
            places = np.argsort(ranks, kind="stable")[(ranks < 0).sum() :].reshape(len(own), -1)
            orders[id(layer)][side][places] = places[order]
