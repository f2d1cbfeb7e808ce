"""A convolution beside constants: channels that hold one are cut, and what they gave is added as a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["BorderedConv2d"]


class BorderedConv2d(nn.Conv2d):
    """``nn.Conv2d`` plus what constant channels gave that :func:`sparsekit.compact` cut.

    ``edge [out, kh, kw]``: per tap the sum over those channels of weight times constant. Inside an image it adds up to
    one number per output; under the padded border some taps see zeros, so a map of the image's size is added.
    """

    edge: Tensor
    _map: tuple[tuple, Tensor] | None = None

    @classmethod
    def take_over(cls, module: nn.Conv2d, edge: Tensor) -> None:
        """Make a convolution one of this class, in place."""
        module.__class__ = cls
        module.register_buffer("edge", edge)

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        if isinstance(input, Proxy):  # one call in a graph of torch.fx, as torch's own layers are
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        y = super().forward(input)
        return y.add_(self._of(input)) if not torch.is_grad_enabled() else y + self._of(input)

    def _of(self, x: Tensor) -> Tensor:
        """The map ``[out, OH, OW]`` for images like x; the last one is kept where nothing differentiates or traces."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._make(x)
        key = (x.shape[-2:], x.dtype, x.device, self.edge._version, self.edge.data_ptr())
        if self._map is None or self._map[0] != key:
            made = self._make(x)
            if type(made) is not Tensor:  # of a mode that has no data
                return made
            self._map = (key, made)
        return self._map[1]

    def _make(self, x: Tensor) -> Tensor:
        ones = torch.ones(1, 1, *x.shape[-2:], dtype=self.edge.dtype, device=self.edge.device)
        return self._conv_forward(ones, self.edge.unsqueeze(1), None)[0].to(x.dtype)
