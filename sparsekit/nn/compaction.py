"""compact: what no surviving weight feeds or reads is cut out of a whole network, exactly."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..mask import Masks
from ..plan import NOISE
from .bordered import BorderedConv2d
from .convert import to_dense
from .needed import Needed
from .rewiring import masked_copy, prefixes, replace, rewired
from .units import Layer, Units
from .walk import read_units
from .whole import compare

__all__ = ["Compaction", "Cut", "compact"]


@dataclass(frozen=True)
class Cut:
    """What became of one layer: (rows, columns) before and after, and why dead rows of it stay."""

    name: str
    before: tuple[int, int]
    after: tuple[int, int]
    kept: dict[str, int] = field(default_factory=dict)


@dataclass
class Compaction:
    """What :func:`compact` returns.

    ``model`` is a plain, smaller copy of the network and ``masks`` those of its weights, as
    :func:`sparsekit.convert` takes them; ``layers`` says what was cut, ``note`` how constants are kept, ``problem``
    why nothing could be cut (else ``""``). ``str()`` gives the table. :meth:`expand` is the way back; for it a masked
    copy of the original is held.
    """

    model: nn.Module
    masks: Masks
    layers: tuple[Cut, ...]
    problem: str = ""
    note: str = ""
    original: nn.Module = field(default_factory=nn.Module, repr=False)
    original_masks: Masks = field(default_factory=dict)
    kept: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Per entry of the state dict the index of what is left of it; entries without one are whole."""
    changed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Entries that took over constants: (as they were, as they became) where they are left."""

    def expand(self, model: nn.Module | None = None) -> nn.Module:
        """The network in its original classes, shapes and keys, pruned weights 0.

        ``model`` is :attr:`model` (default), trained on, or converted. What is left of every tensor comes from it,
        what was cut is as it was: bit for bit the masked original when nothing was trained. A bias that took over
        constants gives them back, which rounds once it was trained.
        """
        state = to_dense(self.model if model is None else model).state_dict()
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, BorderedConv2d):
                del state[f"{name}.edge" if name else "edge"]
        full = copy.deepcopy(self.original)
        own = full.state_dict()
        if state.keys() != own.keys():
            odd = sorted(state.keys() ^ own.keys())[0]
            raise ValueError(f"{odd}: Expected a model that this compaction made, got another one's state")
        with torch.no_grad():
            for name, target in own.items():
                source, index = state[name].to(target.device), self.kept.get(name, ...)
                if source.shape != target[index].shape:
                    wanted = list(target[index].shape)
                    raise ValueError(f"{name}: Expected a shape of {wanted} as cut, got {list(source.shape)}")
                if name in self.changed:
                    before, after = self.changed[name]
                    source = torch.where(source == after, before, source - (after - before))
                target[index] = source
            for name, mask in self.original_masks.items():
                own[name].masked_fill_(~mask.to(own[name].device), 0)
        return full

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        lines = []
        for cut in self.layers:
            rows, columns = (f"{a} -> {b}" if a != b else str(a) for a, b in zip(cut.before, cut.after, strict=True))
            why = "; ".join(f"{count} dead kept: {reason}" for reason, count in cut.kept.items())
            lines.append((cut.name, f"{rows} out", f"{columns} in", why or "-"))
        lines = [("layer", "outputs", "inputs", "what stays, and why"), *lines]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in lines]
        return "\n".join([*table, self.note] if self.note else table)


def compact(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    inference: bool = False,
) -> Compaction:
    """Cut dead units out of a whole network: a smaller plain network that gives the same outputs up to rounding.

    A row, channel or column goes when nothing that survives reads it, or when nothing that varies feeds it: the
    constant it holds is then 0, or is added to the next bias. Units that a residual sum, a concatenation or a view
    ties together go together or stay. Who feeds whom is read by ``torch.fx``, or, where that cannot trace the model,
    by ``torch.export`` on the path that ``example_inputs`` take (``note`` says so). In a model that neither can read
    nothing is cut, with a warning: :func:`convert` still cuts layer by layer (``compact`` format).

    Args:
        masks: as in :func:`sparsekit.convert`, with None for the zeros and masks that the model carries.
        example_inputs: a tensor, or a tuple or dict of arguments, to follow shapes with; the result is checked on
            them. None tries a batch of plausible size.
        inference: by default outputs are equal in eval and in training mode, so a channel whose constant differs
            between the two (batch norms) or at the zero-padded border of a convolution stays. True promises eval
            mode alone: such channels go too. Their constants are added to the layer that reads them as a map, or
            carried by one channel per layer, whichever measures faster on the inputs (``note`` says which).

    What is left trains as in the whole network, but that the constants of dead units are no parameters of their
    own any more: they are part of the next bias.

    Returns: a :class:`Compaction`; ``convert(cut.model, cut.masks, x)`` goes on from there.
    Raises: ValueError or TypeError naming the layer on bad masks, as :func:`sparsekit.convert` does.
    """
    original, masks = masked_copy(model, masks)
    result, problem = rewired(
        original,
        example_inputs,
        lambda inputs, given: read_units(original, masks, inputs, (False,) if inference else (False, True), given),
        lambda units, given: _fastest(original, masks, units, inference, given),
    )
    if result is None:
        problem = f"nothing is cut, {problem}"
        warnings.warn(f"compact: {problem}; convert still cuts layer by layer", stacklevel=2)
        return Compaction(copy.deepcopy(original), masks, (), problem, original=original, original_masks=masks)
    return result


def _fastest(original: nn.Module, masks: Masks, units: Units, inference: bool, inputs: Any) -> Compaction:
    """Constants under zero padding carried by a channel of theirs, or added as maps: whichever is faster."""
    carried = _cut(original, masks, units, Needed(units, inference))
    if not inference or not any("carries" in reason for cut in carried.layers for reason in cut.kept):
        return carried
    mapped = _cut(original, masks, units, _mapping(masks, units))
    models = {"carried": carried.model, "mapped": mapped.model}
    try:
        times = compare(models, inputs, False) if mapped.layers != carried.layers else None
    except RuntimeError:  # inputs were a guess that the model does not take
        times = None
    if times is None:
        return carried
    ratio = times["carried"] / times["mapped"]
    best = mapped if ratio > NOISE else carried
    how = "added as maps" if best is mapped else "carried by a channel per layer"
    best.note += "; " * bool(best.note) + f"constants under zero padding are {how}: maps are {ratio:.2f}x as fast"
    return best


def _mapping(masks: Masks, units: Units) -> Needed:
    """What stays when every convolution that can adds constants as a map: those that are plain after the cut."""
    maps = {n for n in units.layers.values() if n.alive is not None and type(n.module) is nn.Conv2d and n.groups == 1}
    maps = {layer for layer in maps if layer.bordered or layer.module.bias is None}
    while True:
        needed = Needed(units, True, maps)
        holes = {layer for layer in maps if not _left(masks, layer, needed).all()}
        if not holes:
            return needed
        maps -= holes


def _left(masks: Masks, layer: Layer, needed: Needed) -> Tensor:
    mask = masks.get(f"{layer.name}.weight" if layer.name else "weight", torch.ones(1, 1, dtype=torch.bool))
    rows, columns = (torch.from_numpy(needed.of(ids)) for ids in (layer.outs, layer.ins))
    return mask.cpu().expand(len(rows), len(columns), *mask.shape[2:])[rows][:, columns]


def _cut(original: nn.Module, masks: Masks, units: Units, needed: Needed) -> Compaction:
    model = copy.deepcopy(original)
    result = Compaction(model, dict(masks), (), note=units.note, original=original, original_masks=masks)
    copies, names = dict(zip(map(id, original.modules()), model.modules(), strict=True)), prefixes(original)
    cuts = []
    for layer in units.layers.values():
        rows, columns = needed.of(layer.outs), needed.of(layer.ins)
        if layer.alive is not None:
            cuts.append(_describe(layer, rows, columns, needed))
        if rows.all() and columns.all():
            continue
        with torch.no_grad():
            if layer.alive is None:
                kept, changed = _shrink_norm(copies[id(layer.module)], rows), {}
            else:
                key = f"{layer.name}.weight" if layer.name else "weight"
                kept, changed = _shrink(copies[id(layer.module)], layer, needed, masks.get(key))
                if key in masks:
                    result.masks[key] = changed.pop("mask", masks[key])[tuple(i.cpu() for i in kept["weight"])]
                if isinstance(copies[id(layer.module)], BorderedConv2d):
                    result.masks.pop(key, None)  # plain, and of a class that convert leaves alone
        for prefix in names[id(layer.module)]:
            result.kept |= {prefix + leaf: index for leaf, index in kept.items()}
            result.changed |= {prefix + leaf: pair for leaf, pair in changed.items()}
    result.layers = tuple(cuts)
    return result


def _describe(layer: Layer, rows: np.ndarray, columns: np.ndarray, needed: Needed) -> Cut:
    dead = ~layer.alive.any(2).reshape(-1) & rows
    reasons = Counter(needed.why[int(name)] for name in needed.units.classes[layer.outs[dead]])
    before, after = (len(rows), len(columns)), (int(rows.sum()), int(columns.sum()))
    return Cut(layer.name or type(layer.module).__name__, before, after, dict(reasons))


def _shrink_norm(norm: nn.Module, rows: np.ndarray) -> dict[str, tuple[Tensor, ...]]:
    kept = {}
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, leaf)
        if tensor is not None:
            kept[leaf] = index = (torch.from_numpy(rows.nonzero()[0]).to(tensor.device),)
            replace(norm, leaf, tensor[index])
    norm.num_features = int(rows.sum())
    return kept


def _shrink(module: nn.Module, layer: Layer, needed: Needed, mask: Tensor | None):
    """Cut a linear or convolution layer; the index of what is left, and what constants changed."""
    where, groups = module.weight.device, layer.groups
    rows, columns = needed.of(layer.outs), needed.of(layer.ins)
    by_group = columns.reshape(groups, -1)
    live = by_group.any(1) & rows.reshape(groups, -1).any(1)
    width = int(by_group[live][0].sum())
    inside = np.zeros((groups, width), int)
    inside[live] = by_group[live].nonzero()[1].reshape(-1, width)
    of_group = np.arange(len(rows)) // (len(rows) // groups)
    row = torch.from_numpy(rows.nonzero()[0]).to(where)
    column = torch.from_numpy(inside[of_group[rows]]).to(where)
    kept = {"weight": (row[:, None], column)}
    weight, changed = module.weight.detach(), {}

    const = np.where(columns | np.isnan(needed.const[layer]), 0.0, needed.const[layer])  # what goes, else 0
    read = (layer.alive & rows.reshape(groups, -1, 1)).any(1).reshape(-1)
    taken = needed.merged[layer] & ~columns & read
    if taken.any():
        stays = needed.merged[layer] & columns
        weight, merged_mask = _merge(module.weight.detach(), mask, needed.const[layer], stays, taken)
        changed["weight"] = (module.weight.detach()[kept["weight"]].clone(), weight[kept["weight"]].clone())
        if merged_mask is not None:
            changed["mask"] = merged_mask
        const = np.where(taken, 0.0, const)
    if layer in needed.maps:
        gone = torch.from_numpy(const).to(where)
        edge = (module.weight.detach().double() * gone.view(1, -1, 1, 1))[row].sum(1).to(weight.dtype)
        if edge.any():
            BorderedConv2d.take_over(module, edge)
        const = np.zeros_like(const)
    if module.bias is not None:
        kept["bias"] = (row,)
        before = module.bias.detach()[row].clone()
        add = (layer.taps * const.reshape(groups, 1, -1)).sum(2).reshape(-1)[rows]
        after = (before.double() + torch.from_numpy(add).to(where)).to(before.dtype)
        if add.any():
            changed["bias"] = (before, after)
        replace(module, "bias", after)
    replace(module, "weight", weight[kept["weight"]])
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = int(columns.sum()), int(rows.sum())
    else:
        module.in_channels, module.out_channels = int(columns.sum()), int(rows.sum())
        module.groups = int(live.sum())
    return kept, changed


def _merge(weight: Tensor, mask: Tensor | None, const: np.ndarray, stays: np.ndarray, goes: np.ndarray):
    """Let one constant column that stays stand for those that go: its weights carry their sum, border and all."""
    one, taken = int(np.where(stays, np.abs(const), 0).argmax()), goes.nonzero()[0]
    ratio = torch.from_numpy(const[taken] / const[one]).to(weight.device)
    shape = (1, -1, *[1] * (weight.dim() - 2))
    total = weight[:, one].double() + (weight[:, taken].double() * ratio.view(shape)).sum(1)
    weight = weight.clone()
    weight[:, one] = total.to(weight.dtype)
    if mask is not None:
        mask = mask.clone()
        mask[:, one] |= mask[:, taken].any(1)
    return weight, mask
