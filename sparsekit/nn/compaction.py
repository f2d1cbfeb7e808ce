"""compact: what no surviving weight feeds or reads is cut out of a whole network, exactly."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..mask import Masks, mask_of
from ..prune import prunable
from .convert import convert, to_dense
from .units import Layer, Units, Untraceable, read_units

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
    :func:`sparsekit.convert` takes them; ``layers`` says what was cut, ``problem`` why nothing could be (else
    ``""``). ``str()`` gives the table. :meth:`expand` is the way back; for it a masked copy of the original is held.
    """

    model: nn.Module
    masks: Masks
    layers: tuple[Cut, ...]
    problem: str = ""
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
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in lines
        )


def compact(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    inference: bool = False,
) -> Compaction:
    """Cut dead units out of a whole network: a smaller plain network that gives the same outputs up to rounding.

    A row, channel or column goes when nothing that survives reads it, or when nothing that varies feeds it: the
    constant it holds is then 0, or is added to the next bias. Units that a residual sum, a concatenation or a view
    ties together go together or stay. Who feeds whom is read by ``torch.fx``; in a model that it cannot trace
    nothing is cut, with a warning: :func:`convert` still cuts layer by layer (``compact`` format).

    Args:
        masks: as in :func:`sparsekit.convert`, with None for the zeros and masks that the model carries.
        example_inputs: a tensor, or a tuple or dict of arguments, to follow shapes with; the result is checked on
            them. None tries a batch of plausible size.
        inference: by default outputs are equal in eval and in training mode, so a channel whose constant differs
            between the two (batch norms) or at the zero-padded border of a convolution stays. True promises eval
            mode alone: such channels go too, all but one that carries their sum. Training then means the bias of
            a dead unit no more: what it added is part of the next layer's.

    Returns: a :class:`Compaction`; ``convert(cut.model, cut.masks, x)`` goes on from there.
    Raises: ValueError or TypeError naming the layer on bad masks, as :func:`sparsekit.convert` does.
    """
    if masks is None:
        masks = {name: mask_of(module) for name, module in prunable(model).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no weight survives")
        original = to_dense(convert(model, masks, impl="dense"), inplace=True)
    masks = {name: mask.detach().clone() for name, mask in masks.items()}
    problem = ""
    for inputs in [example_inputs] if example_inputs is not None else _guesses(original):
        try:
            units = read_units(original, masks, inputs, (False,) if inference else (False, True))
        except Untraceable as error:
            problem = problem or f"nothing is cut, torch.fx cannot trace {type(model).__name__} ({error})"
            continue
        result = _cut(original, masks, units, inference)
        problem = _differs(result, inputs)
        if not problem:
            return result
    warnings.warn(f"compact: {problem}; convert cuts layer by layer", stacklevel=2)
    return Compaction(copy.deepcopy(original), masks, (), problem, original, masks)


def _guesses(model: nn.Module) -> list[Tensor]:
    """Inputs a model might take, by its first layer."""
    first = next((m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)), None)
    if first is None:
        return [torch.zeros(2, 1)]
    like = {"device": first.weight.device, "dtype": first.weight.dtype}
    generator = torch.Generator().manual_seed(0)
    sizes = [(first.in_features,)] if isinstance(first, nn.Linear) else [
        (first.in_channels, side, side) for side in (32, 28, 64, 8, 224, 16, 96)
    ]  # fmt: skip
    return [torch.randn(2, *size, generator=generator).to(**like) for size in sizes]


def _differs(result: Compaction, inputs: Any) -> str:
    """Why the cut network is not the original one on these inputs; ``""`` when it is."""
    outputs = []
    for model in (result.original, result.model):
        model = copy.deepcopy(model).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                if isinstance(inputs, Mapping):
                    outputs.append(model(**inputs))
                else:
                    outputs.append(model(*inputs) if isinstance(inputs, tuple | list) else model(inputs))
            except RuntimeError as error:
                return f"nothing is cut, the smaller network fails ({str(error).splitlines()[0]})"
    wanted, got = (torch.utils._pytree.tree_leaves(output) for output in outputs)
    for one, other in zip(wanted, got, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            limit = 100 * torch.finfo(one.dtype).eps
            if one.shape != other.shape or not (one - other).norm() <= limit * one.norm().clamp(min=1e-6):
                return "nothing is cut, the smaller network does not give the same outputs"
    return ""


class _Needed:
    """Which classes stay: those that are fixed, and whatever the ones that stay read, until nothing changes."""

    def __init__(self, units: Units, inference: bool) -> None:
        self.units = units
        self.classes = np.zeros(max(units.count, 1), bool)
        self._steps: list[Callable[[Layer], None]] = []
        self.why: dict[int, str] = {}
        calls: dict[Layer, list[np.ndarray]] = {}
        for read in units.reads:
            calls.setdefault(read.layer, []).append(read.const)
        self.const = {layer: _agreed(consts) for layer, consts in calls.items()}
        self.moves = {n: np.isnan(self.const[n]) & ~np.isnan(consts).any(0) for n, consts in calls.items()}
        self.merged = {}
        for layer, const in self.const.items():
            folds = not layer.bordered and layer.module.bias is not None
            self.merged[layer] = (const != 0) & ~np.isnan(const) & (not folds and inference and layer.groups == 1)
        for name, reason in units.reasons.items():
            self.classes[name] = True
            self.why[name] = reason
        layers = [layer for layer in units.layers.values() if layer.alive is not None]
        for step in (self._read, self._carry, self._even, self._one):  # later steps wait until earlier ones are done
            self._steps.append(step)
            self._settle(layers)

    def _settle(self, layers: list[Layer]) -> None:
        before = -1
        while before != (before := int(self.classes.sum())):
            for step in self._steps:
                for layer in layers:
                    step(layer)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Which of these units stay."""
        return self.classes[self.units.classes[ids]]

    def keep(self, ids: np.ndarray, reason: str) -> None:
        for name in self.units.classes[ids]:
            if not self.classes[name]:
                self.classes[name] = True
                self.why[int(name)] = reason

    def folds(self, layer: Layer) -> np.ndarray:
        """Columns whose constant is 0 or goes into the bias."""
        const = self.const[layer]
        return (const == 0) | ~np.isnan(const) & (not layer.bordered and layer.module.bias is not None)

    def _read(self, layer: Layer) -> None:
        const, merged = self.const[layer], self.merged[layer]
        rows = self.of(layer.outs).reshape(layer.groups, -1, 1)
        read = (layer.alive & rows).any(1).reshape(-1) & ~self.folds(layer)
        constant = ~np.isnan(const)
        self.keep(layer.ins[read & self.moves[layer]], f"constant, but another one in training, for {layer.name}")
        self.keep(layer.ins[read & ~constant], f"read by {layer.name}")
        where = "at the padded border of" if layer.bordered else "and there is no bias in"
        self.keep(layer.ins[read & constant & ~merged], f"constant, {where} {layer.name}")

    def _carry(self, layer: Layer) -> None:
        """One of the constants that cannot go into the bias stays and stands for all."""
        const, merged = self.const[layer], self.merged[layer]
        rows = self.of(layer.outs).reshape(layer.groups, -1, 1)
        goes = merged & (layer.alive & rows).any(1).reshape(-1)
        if goes.any() and not (merged & self.of(layer.ins)).any():
            one = np.where(goes, np.abs(const), 0).argmax()
            self.keep(layer.ins[one : one + 1], f"carries the constants read by {layer.name}")

    def _one(self, layer: Layer) -> None:
        for ids in (layer.outs, layer.ins):
            if not self.of(ids).any():
                self.keep(ids[:1], "torch convolves no empty tensors")

    def _even(self, layer: Layer) -> None:
        """Groups of a convolution that stay keep equally many rows and columns."""
        if layer.groups == 1:
            return
        sides = [ids.reshape(layer.groups, -1) for ids in (layer.outs, layer.ins)]
        live = np.any([self.of(ids).any(1) for ids in sides], axis=0)
        for ids in sides:
            stays = self.of(ids)
            most = max(1, int(stays.sum(1).max()))
            for group in live.nonzero()[0]:
                spare = ids[group][~stays[group]]
                self.keep(spare[: max(0, most - int(stays[group].sum()))], f"evens the groups of {layer.name}")


def _agreed(consts: list[np.ndarray]) -> np.ndarray:
    """The constants that every call sees alike, NaN elsewhere."""
    same = np.all([const == consts[0] for const in consts], axis=0)
    return np.where(same, consts[0], np.nan)


def _cut(original: nn.Module, masks: Masks, units: Units, inference: bool) -> Compaction:
    needed = _Needed(units, inference)
    model = copy.deepcopy(original)
    result = Compaction(model, dict(masks), (), "", original, masks)
    copies = dict(zip(map(id, original.modules()), model.modules(), strict=True))
    names: dict[int, list[str]] = {}
    for name, module in original.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(f"{name}." if name else "")
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
        for prefix in names[id(layer.module)]:
            result.kept |= {prefix + leaf: index for leaf, index in kept.items()}
            result.changed |= {prefix + leaf: pair for leaf, pair in changed.items()}
    result.layers = tuple(cuts)
    return result


def _describe(layer: Layer, rows: np.ndarray, columns: np.ndarray, needed: _Needed) -> Cut:
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
            _replace(norm, leaf, tensor[index])
    norm.num_features = int(rows.sum())
    return kept


def _shrink(module: nn.Module, layer: Layer, needed: _Needed, mask: Tensor | None):
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
        folded = needed.merged[layer] & columns
        weight, merged_mask = _merge(module.weight.detach(), mask, needed.const[layer], folded, taken)
        changed["weight"] = (module.weight.detach()[kept["weight"]].clone(), weight[kept["weight"]].clone())
        if merged_mask is not None:
            changed["mask"] = merged_mask
        const = np.where(taken, 0.0, const)
    if module.bias is not None:
        kept["bias"] = (row,)
        before = module.bias.detach()[row].clone()
        add = (layer.taps * const.reshape(groups, 1, -1)).sum(2).reshape(-1)[rows]
        after = (before.double() + torch.from_numpy(add).to(where)).to(before.dtype)
        if add.any():
            changed["bias"] = (before, after)
        _replace(module, "bias", after)
    _replace(module, "weight", weight[kept["weight"]])
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


def _replace(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    tensor, old = tensor.contiguous().clone(), getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, leaf, tensor)
