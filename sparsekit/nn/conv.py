"""SparseConv2d and SparseConv1d, the drop-ins of nn.Conv2d and nn.Conv1d."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..format import Conv
from ..functional import check_conv2d, sparse_conv2d
from ..mask import weight_of
from .base import SparseModule
from .planes import Planes, convolve

__all__ = ["SparseConv1d", "SparseConv2d"]

_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


class _SparseConv(SparseModule):
    """What convolutions share; the arguments and their defaults are those of the dense class."""

    transposed, output_padding = False, (0, 0)  # tools that read a convolution ask for them

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        mask: Tensor | None = None,
        format: str = "csr",
    ) -> None:
        super().__init__()
        dense = self.dense_class(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._copy_geometry(dense)
        self._adopt(dense, dense.weight, mask, format)

    @classmethod
    def from_dense(cls, module: nn.Module, mask: Tensor, format: str = "csr", name: str = ""):
        """A copy of ``module`` under ``mask``; weights under ``torch.nn.utils.prune`` are read through it."""
        self = cls.__new__(cls)
        SparseModule.__init__(self)
        self.layer_name = name
        self._copy_geometry(module)
        self._adopt(module, weight_of(module), mask, format)
        return self

    def _copy_geometry(self, dense: nn.Module) -> None:
        for name in _GEOMETRY:
            setattr(self, name, getattr(dense, name))
        sides = [self._sides(axis) for axis in range(len(self.kernel_size))]
        before, after = zip(*sides, strict=True)
        inner = before if before == after and self.padding_mode == "zeros" else (0,) * len(sides)
        # F.pad takes (left, right, top, bottom); what the kernel cannot pad itself is padded before it.
        self._outer = None if inner == before == after else tuple(n for side in reversed(sides) for n in side)
        self._conv = Conv(*map(self._plane, (self.stride, inner, self.dilation), (1, 0, 1)), self.groups)

    def _plane(self, extents: tuple[int, ...], other: int) -> tuple[int, int]:
        """(height, width) of a geometry; ``other`` stands for an axis that the layer lacks."""
        own = self._each_axis(extents)
        return (other,) * (2 - len(own)) + own

    def _each_axis(self, extents: tuple[int, ...]) -> tuple[int, ...]:
        """One entry per axis; torch takes one for all of them too."""
        axes = len(self.kernel_size)
        own = tuple(extents) * axes if len(extents) == 1 else tuple(extents)
        if len(own) != axes:
            raise ValueError(f"{type(self).__name__}: Expected {axes} entries of a geometry, got {tuple(extents)}")
        return own

    def _sides(self, axis: int) -> tuple[int, int]:
        if self.padding == "same":
            total = self._each_axis(self.dilation)[axis] * (self.kernel_size[axis] - 1)
            return total // 2, total - total // 2
        side = 0 if self.padding == "valid" else self._each_axis(self.padding)[axis]
        return side, side

    def _padded(self, x: Tensor) -> Tensor:
        if self._outer is None:
            return x
        return F.pad(x, self._outer, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _convolve(self, x: Tensor, skip: Tensor | None = None, activation: str = "none") -> Tensor:
        own = self._parameters  # a plain dict: nn.Module's attribute lookup costs as much as the checks below
        values = own["values"] if "values" in own else self.values  # noqa: SIM401 - the default costs
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        try:
            if skip is None and activation == "none":
                if values is self._guarded or self._bare(values, x):  # nothing of ours is left to pay for
                    return F.conv2d(x, values, bias, *self._conv)
                activation = self.activation
            index = self._index(x)
            return sparse_conv2d(x, values, index, self.shape, self.format, bias, self._conv, activation, skip)
        except (ValueError, RuntimeError) as error:
            raise self._explain(error, x) from None

    def _check(self, x: Tensor) -> None:
        check_conv2d(x, self.shape, self._conv)

    def _empty_dense(self) -> nn.Module:
        geometry = {name: getattr(self, name) for name in _GEOMETRY}
        return self.dense_class(**geometry, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        axes = len(self.kernel_size)
        defaults = {"padding": (0,) * axes, "dilation": (1,) * axes, "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, {self._repr_tail()}"


class SparseConv2d(_SparseConv):
    """``nn.Conv2d`` over the survivors of a mask ``[out, in/groups, kh, kw]`` (None: all survive).

    Same arguments, initialisation and call as ``nn.Conv2d``; ``format`` says how the survivors are
    stored and run. Raises ValueError or TypeError on a mask of another shape or dtype, an unknown format.
    """

    dense_class = nn.Conv2d
    border: int | None = None
    """Of the planes that the layer gives, or None for images; :func:`sparsekit.fuse` sets it."""

    def forward(self, input: Tensor, skip: Tensor | None = None, activation: str = "none") -> Tensor:
        """``x [N, C, H, W]`` or ``[C, H, W]`` to ``[N, out, OH, OW]`` or ``[out, OH, OW]``.

        ``skip`` is added and ``activation`` (relu, gelu, silu) applied after it: :func:`sparsekit.fuse` asks for both.
        """
        if isinstance(input, Proxy):
            return self._traced(input, *(() if skip is None and activation == "none" else (skip, activation)))
        if self.border is not None or type(input) is Planes or type(skip) is Planes:
            y = convolve(self, input, skip, activation)
            if y is not NotImplemented:
                return y
        return self._convolve(self._padded(input), skip, activation)


class SparseConv1d(_SparseConv):
    """``nn.Conv1d`` over the survivors of a mask ``[out, in/groups, k]``: a convolution of images of one row.

    Arguments, ``format`` and errors as of :class:`SparseConv2d`; ``weight`` and state dicts have the shapes
    of ``nn.Conv1d``.
    """

    dense_class = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        """``x [N, C, L]`` or ``[C, L]`` to ``[N, out, OL]`` or ``[out, OL]``."""
        if isinstance(input, Proxy):
            return self._traced(input)
        if input.dim() not in (2, 3) or input.shape[-2] != self.in_channels:
            name = self.layer_name or type(self).__name__
            raise ValueError(f"{name}: Expected an input of shape [N, {self.in_channels}, L], got {list(input.shape)}")
        return self._convolve(self._padded(input).unsqueeze(-2)).squeeze(-2)

    @staticmethod
    def _fold(dense: Tensor) -> Tensor:
        return dense.unsqueeze(2)

    @staticmethod
    def _unfold(folded: Tensor) -> Tensor:
        return folded.squeeze(2)
