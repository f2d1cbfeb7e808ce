"""Formats: how survivors are stored, and the verbs that run on the storage.

A format is one folder under ``kernels/`` holding a ``FORMAT`` instance, plus its name in ``_KNOWN``
below. Names are looked up here and nowhere else, so a name read from a file never imports anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Conv", "Format", "Index", "get", "names", "saved_names"]

# Simplest first: ties go to the earlier one.
_KNOWN = ("dense", "compact", "csr", "bsr", "lanes", "panel", "bitmap", "nm")

Index = tuple[Tensor | None, ...]


class Conv(NamedTuple):
    """The geometry of a 2-D convolution; every entry but ``groups`` is (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Format(ABC):
    """A storage of the survivors of a weight and the six verbs on it, closed under differentiation.

    ``x [N, in]``, ``y, dy [N, out]``; images ``x [N, C, H, W]``. ``values`` is the trainable tensor in
    the format's own layout, ``index`` the tensors named by ``index_names`` in that order (None where
    one does not apply), ``shape`` the dense weight's shape. Verbs work on detached tensors:
    :mod:`sparsekit.autograd` makes them differentiable.
    """

    name: str
    index_names: tuple[str, ...]
    """All index tensors; ``derived_names`` follow from the others and are not saved, ``optional_names`` may be
    absent."""
    derived_names: tuple[str, ...] = ()
    optional_names: tuple[str, ...] = ()
    grouped: bool = True
    """Whether the convolution verbs take ``groups`` other than 1."""

    masked: bool = False
    """Whether ``values`` is the dense weight and the first index tensor its mask: then torch differentiates it, and
    only the gradient is masked."""

    def fused(self, x: Tensor, shape: torch.Size) -> bool:
        """Whether ``sddmm`` of a ``masked`` format is faster than torch's own gradient, masked afterwards."""
        return False

    def __reduce__(self):
        return get, (self.name,)  # one instance per process: copies and pickles name it

    serves: int | None = None
    """The rows of ``x [N, in]`` up to which a plan tries it, and then without gradients only; None: any, and with."""

    epilogue: tuple[str, ...] = ()
    """Activations that ``linear`` and ``conv2d`` take as a last argument and apply for free."""

    adds = False
    """Whether ``conv2d`` takes, after the activation, a tensor like its result to add before it (on the CPU)."""

    @abstractmethod
    def index(self, mask: Tensor, groups: int = 1) -> dict[str, Tensor]:
        """The saved index tensors of a bool mask; ``groups`` are those of a convolution."""

    def prepare(self, index: dict[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
        """The derived index tensors that a layer holds from the start; a verb that misses one works, slower."""
        return {}

    def derive(self, index: dict[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
        """The other derived index tensors, which only the backward pass needs."""
        return {}

    @abstractmethod
    def survivors(self, index: dict[str, Tensor], shape: torch.Size) -> Tensor:
        """The bool mask that :meth:`index` was made from."""

    @abstractmethod
    def gather(self, weight: Tensor, index: dict[str, Tensor]) -> Tensor:
        """The survivors of a dense weight as ``values`` (differentiable, a copy)."""

    @abstractmethod
    def scatter(self, values: Tensor, index: dict[str, Tensor], shape: torch.Size) -> Tensor:
        """The dense weight, pruned entries exactly 0 (differentiable; the gradient is exactly 0 there)."""

    @abstractmethod
    def check(self, values: Tensor, index: dict[str, Tensor], shape: torch.Size) -> str | None:
        """Why tensors from outside are no weight of ``shape`` in this format, or None when they are one."""

    def unsupported(self, mask: Tensor, groups: int = 1) -> str | None:
        """Why this format is no candidate for a mask, or None when it is one."""
        return None

    def absent(self, where: torch.device, mask: Tensor, groups: int = 1) -> str | None:
        """Why a device has no kernel for a mask in this format, or None; the verbs work all the same, densely."""
        return None

    def stored(self, mask: Tensor, groups: int = 1) -> tuple[int, str]:
        """How many values it would hold for a mask that it supports, and in what blocks (``"16x16"``, ``""`` for
        none), found without packing it."""
        return int(mask.count_nonzero()), ""

    @abstractmethod
    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None, index: Index, shape: torch.Size) -> Tensor:
        """``x Wᵀ + bias``."""

    @abstractmethod
    def linear_t(self, dy: Tensor, values: Tensor, index: Index, shape: torch.Size) -> Tensor:
        """``dy W``."""

    @abstractmethod
    def sddmm(self, dy: Tensor, x: Tensor, index: Index, shape: torch.Size) -> Tensor:
        """``dyᵀ x`` at the survivors, in the layout of ``values``."""

    def linear_backward(
        self, dy: Tensor, x: Tensor, values: Tensor, index: Index, shape: torch.Size, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, values and bias, each only where ``needs`` says so."""
        return (
            self.linear_t(dy, values, index, shape) if needs[0] else None,
            self.sddmm(dy, x, index, shape) if needs[1] else None,
            dy.sum(0) if needs[2] else None,
        )

    @abstractmethod
    def conv2d(
        self, x: Tensor, values: Tensor, bias: Tensor | None, index: Index, shape: torch.Size, conv: Conv
    ) -> Tensor:
        """The convolution of ``x [N, C, H, W]`` with W, plus bias."""

    @abstractmethod
    def conv2d_t(
        self, dy: Tensor, values: Tensor, index: Index, shape: torch.Size, conv: Conv, size: tuple[int, int]
    ) -> Tensor:
        """The gradient of an input of height and width ``size``."""

    @abstractmethod
    def conv2d_sddmm(self, dy: Tensor, x: Tensor, index: Index, shape: torch.Size, conv: Conv) -> Tensor:
        """The gradient of W at the survivors, in the layout of ``values``."""

    def conv2d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        values: Tensor,
        index: Index,
        shape: torch.Size,
        conv: Conv,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, values and bias, each only where ``needs`` says so."""
        return (
            self.conv2d_t(dy, values, index, shape, conv, tuple(x.shape[2:])) if needs[0] else None,
            self.conv2d_sddmm(dy, x, index, shape, conv) if needs[1] else None,
            dy.sum((0, 2, 3)) if needs[2] else None,
        )


def saved_names(fmt: Format) -> tuple[str, ...]:
    """The index tensors that are saved with a format's values."""
    return tuple(name for name in fmt.index_names if name not in fmt.derived_names)


_loaded: dict[str, Format] = {}


def names() -> tuple[str, ...]:
    """The names of all formats, simplest first."""
    return _KNOWN


def get(name: str) -> Format:
    """The format called ``name``; raises ValueError with the known names."""
    if name not in _KNOWN:
        raise ValueError(f"Expected a format of {', '.join(_KNOWN)}, got {name!r}")
    if name not in _loaded:
        _loaded[name] = import_module(f"sparsekit.kernels.{name}").FORMAT
    return _loaded[name]
