"""SparseLinear, the drop-in of nn.Linear."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..functional import check_linear, sparse_linear
from ..mask import weight_of
from .base import SparseModule

__all__ = ["SparseLinear"]


class SparseLinear(SparseModule):
    """``nn.Linear`` over the survivors of a mask ``[out_features, in_features]`` (None: all survive).

    Same arguments, initialisation and call as ``nn.Linear``; ``format`` says how the survivors are
    stored and run. Raises ValueError or TypeError on a mask of another shape or dtype, an unknown format.
    """

    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        mask: Tensor | None = None,
        format: str = "csr",
    ) -> None:
        super().__init__()
        dense = nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self._adopt(dense, dense.weight, mask, format)

    @classmethod
    def from_dense(cls, module: nn.Linear, mask: Tensor, format: str = "csr", name: str = "") -> SparseLinear:
        """A copy of ``module`` under ``mask``; weights under ``torch.nn.utils.prune`` are read through it."""
        self = cls.__new__(cls)
        super(SparseLinear, self).__init__()
        self.layer_name = name
        self.in_features, self.out_features = module.in_features, module.out_features
        self._adopt(module, weight_of(module), mask, format)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``."""
        if isinstance(input, Proxy):
            return self._traced(input)
        own = self._parameters  # a plain dict: nn.Module's attribute lookup costs as much as the checks below
        values = own["values"] if "values" in own else self.values  # noqa: SIM401 - the default costs
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        try:
            if values is self._guarded or self._bare(values, input):  # nothing of ours is left to pay for
                return F.linear(input, values, bias)
            return sparse_linear(input, values, self._index(input), self.shape, self.format, bias, self.activation)
        except (ValueError, RuntimeError) as error:
            raise self._explain(error, input) from None

    def _check(self, x: Tensor) -> None:
        check_linear(x, self.shape)

    def _empty_dense(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._repr_tail()}"
