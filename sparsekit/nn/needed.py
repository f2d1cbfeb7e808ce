"""Which classes of units stay when the dead are cut out of a network."""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np

from .units import Layer, Units

__all__ = ["Needed"]


class Needed:
    """Which classes stay: those that are fixed, and whatever the ones that stay read, until nothing changes."""

    def __init__(self, units: Units, inference: bool, maps: Set[Layer] = frozenset()) -> None:
        """``maps`` are the layers that can add what constant columns give as a map."""
        self.units, self.maps = units, maps
        self.classes = np.zeros(max(units.count, 1), bool)
        self._steps: list[Callable[[Layer], None]] = []
        self.why: dict[int, str] = {}
        layers = [layer for layer in units.layers.values() if layer.alive is not None]
        calls: dict[Layer, list[np.ndarray]] = {layer: [] for layer in layers}
        for read in units.reads:
            calls[read.layer].append(read.const)
        for layer, consts in calls.items():
            consts += [] if consts else [np.full(len(layer.ins), np.nan)]  # its weight is used, it is not called
        self.const = {layer: _agreed(consts) for layer, consts in calls.items()}
        self.moves = {n: np.isnan(self.const[n]) & ~np.isnan(consts).any(0) for n, consts in calls.items()}
        self.merged = {}
        for layer, const in self.const.items():
            folds = layer in maps or (not layer.bordered and layer.module.bias is not None)
            self.merged[layer] = (const != 0) & ~np.isnan(const) & (not folds and inference and layer.groups == 1)
        for name, reason in units.reasons.items():
            self.classes[name] = True
            self.why[name] = reason
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
        """Columns whose constant is 0 or goes into the bias, or a map."""
        const = self.const[layer]
        somewhere = layer in self.maps or (not layer.bordered and layer.module.bias is not None)
        return (const == 0) | ~np.isnan(const) & somewhere

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
