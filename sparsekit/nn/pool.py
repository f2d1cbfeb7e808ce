"""Max pooling between layers that serve."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..functional import transformed
from .operations import hooked
from .planes import Planes, pool

__all__ = ["Pooled"]


class Pooled(nn.Module):
    """An ``nn.MaxPool2d`` that serves through a kernel of ours where torch's own is slow: contiguous, on the CPU.

    torch's vectorises channels_last alone. Numbers are the same to the bit; a gradient, another dtype or memory format
    and a compiler get torch's. ``to_dense`` puts the original back.
    """

    border: int | None = None
    """Of the planes that it gives for planes, or None for images; :func:`sparsekit.fuse` sets it."""

    def __init__(self, original: nn.MaxPool2d) -> None:
        super().__init__()
        self.original = original
        window = original.kernel_size, original.stride, original.padding
        self._window = [[n, n] if isinstance(n, int) else list(n) for n in window]

    def forward(self, input: Tensor) -> Tensor:
        """``x [N, C, H, W]`` or ``[C, H, W]`` to ``[N, C, OH, OW]`` or ``[C, OH, OW]``."""
        x = input
        if isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or transformed():
            return self.original(x)
        if type(x) is Planes and self.border is not None and (y := pool(x, self._window, self.border)) is not None:
            return y
        ours = x.dim() == 4 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        if not ours or not x.is_contiguous() or (x.requires_grad and torch.is_grad_enabled()):
            return self.original(x)
        return torch.ops.sparsekit.max_pool2d.default(x, *self._window)

    @staticmethod
    def can_replace(module: nn.Module) -> bool:
        """Whether a module is a plain ``nn.MaxPool2d`` whose windows the kernel knows."""
        plain = type(module) is nn.MaxPool2d and not (module.ceil_mode or module.return_indices)
        return plain and module.dilation in (1, (1, 1)) and not hooked(module)
