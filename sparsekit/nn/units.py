"""Units: which outputs, channels and columns of a network are one and the same thing, read off its graph.

Every row and column of a layer is a unit. Following the tensors from layer to layer, units that must stay or
go together (a row of a convolution, its batch norm's channel, the next layer's column, the other side of a
residual sum) fall into one *class*; beside it goes what is known of its value, a constant where nothing that
varies reaches it. What the walk does not understand fixes the classes it touches, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import nn

__all__ = ["Layer", "Read", "Units"]


@dataclass(eq=False)
class Layer:
    """A layer with rows and columns of units; a norm has the same units as both."""

    name: str
    module: nn.Module
    outs: np.ndarray
    ins: np.ndarray
    alive: np.ndarray | None = None
    """bool ``[groups, rows, columns]``: some tap survives; None for a norm."""
    taps: np.ndarray | None = None
    """float64 like ``alive``: the survivors summed over their taps."""

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def bordered(self) -> bool:
        """Whether zeros are padded around the input, where a constant is no constant."""
        module = self.module
        if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.padding_mode != "zeros" or module.padding == "valid":
            return False
        if module.padding == "same":
            return max(module.kernel_size) > 1
        return max(module.padding) > 0


class Read(NamedTuple):
    """One call of a layer: what is known of the value in each of its columns, in one mode."""

    layer: Layer
    const: np.ndarray


class Units:
    """Classes of units and the calls that read them; :func:`sparsekit.nn.walk.read_units` makes it."""

    def __init__(self) -> None:
        self.layers: dict[int, Layer] = {}
        self.reads: list[Read] = []
        self.count = 0
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._fixed: list[tuple[np.ndarray, str]] = []
        self.classes = np.zeros(0, int)
        self.reasons: dict[int, str] = {}
        self.note = ""

    def new(self, count: int) -> np.ndarray:
        """Numbers for ``count`` more units."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """The units of two arrays are the same, position by position."""
        self._pairs.append((one, other))

    def fix(self, ids: np.ndarray, reason: str) -> None:
        """These units can neither go nor move."""
        self._fixed.append((ids, reason))

    def close(self) -> None:
        """Number the classes: afterwards ``classes[unit]`` and the ``reasons`` of fixed ones hold."""
        label = np.arange(self.count)
        if self._pairs:
            one, other = (np.concatenate(side) for side in zip(*self._pairs, strict=True))
            while True:
                low = np.minimum(label[one], label[other])
                before = label.copy()
                np.minimum.at(label, one, low)
                np.minimum.at(label, other, low)
                label = label[label]
                if np.array_equal(before, label):
                    break
        self.classes = label
        for ids, reason in self._fixed:
            for name in np.unique(label[ids]):
                self.reasons.setdefault(int(name), reason)
