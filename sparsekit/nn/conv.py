"""SparseConv2d, the drop-in of nn.Conv2d."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..format import Conv
from ..functional import sparse_conv2d
from ..mask import weight_of
from .base import SparseModule

__all__ = ["SparseConv2d"]

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


class SparseConv2d(SparseModule):
    """``nn.Conv2d`` over the survivors of a mask ``[out, in/groups, kh, kw]`` (None: all survive).

    Same arguments, initialisation and call as ``nn.Conv2d``; ``format`` says how the survivors are
    stored and run. Raises ValueError or TypeError on a mask of another shape or dtype, an unknown format.
    """

    dense_class = nn.Conv2d
    transposed, output_padding = False, (0, 0)  # tools that read a convolution ask for them

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
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
        dense = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._copy_geometry(dense)
        self._adopt(dense, dense.weight, mask, format)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, mask: Tensor, format: str = "csr", name: str = "") -> SparseConv2d:
        """A copy of ``module`` under ``mask``; weights under ``torch.nn.utils.prune`` are read through it."""
        self = cls.__new__(cls)
        super(SparseConv2d, self).__init__()
        self.layer_name = name
        self._copy_geometry(module)
        self._adopt(module, weight_of(module), mask, format)
        return self

    def _copy_geometry(self, dense: nn.Conv2d) -> None:
        for name in _GEOMETRY:
            setattr(self, name, getattr(dense, name))
        before, after = zip(*map(self._sides, (0, 1)), strict=True)
        inner = before if before == after and self.padding_mode == "zeros" else (0, 0)
        # F.pad takes (left, right, top, bottom); what the kernel cannot pad itself is padded before it.
        self._outer = None if inner == before == after else (before[1], after[1], before[0], after[0])
        self._conv = Conv(tuple(self.stride), inner, tuple(self.dilation), self.groups)

    def _sides(self, axis: int) -> tuple[int, int]:
        if self.padding == "same":
            total = self.dilation[axis] * (self.kernel_size[axis] - 1)
            return total // 2, total - total // 2
        side = 0 if self.padding == "valid" else self.padding[axis]
        return side, side

    def forward(self, x: Tensor) -> Tensor:
        """``x [N, C, H, W]`` or ``[C, H, W]`` to ``[N, out, OH, OW]`` or ``[out, OH, OW]``."""
        if isinstance(x, Proxy):
            return self._traced(x)
        if self._outer is not None:
            x = F.pad(x, self._outer, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        own = self._parameters  # a plain dict: nn.Module's attribute lookup costs as much as the checks below
        values = own["values"] if "values" in own else self.values  # noqa: SIM401 - the default costs
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        try:
            index = self._index(x)
            return sparse_conv2d(x, values, index, self.shape, self.format, bias, self._conv, self.activation)
        except (ValueError, RuntimeError) as error:
            raise self._explain(error, x) from None

    def _empty_dense(self) -> nn.Conv2d:
        geometry = {name: getattr(self, name) for name in _GEOMETRY}
        return nn.Conv2d(**geometry, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, {self._repr_tail()}"
