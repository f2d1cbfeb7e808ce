"""Linearised training: the network replaced by its tangent at the first weights, under the ticket's mask.

What a ticket learns beyond its tangent it learns by moving its features. f(w0) + J (w - w0) is computed by one
forward-mode product (``torch.func.jvp``), which is dense work whatever the mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..mask import check_masks
from ..nn import masks_of, to_dense
from ..prune import prunable

__all__ = ["Tangent"]


class Tangent(nn.Module):
    """The tangent of ``model`` at its weights, trainable where a mask lets it be.

    ``x`` as ``model`` takes it, one tensor, to outputs of its shape. Parameters are the moves w - w0, zero at first:
    of a masked weight ``[survivors]``, so pruned weights stay exactly zero with any optimizer; of others dense.
    Batch norms and dropout act as in eval mode, for the tangent is that of a fixed function.

    Args:
        model: dense, or sparse (then its own masks hold); it is not changed.
        masks: ``{"fc1.weight": bool tensor}``; pruned weights are zero in w0.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        masks = masks_of(model) if masks is None else dict(masks)
        self.base = to_dense(model).eval()
        check_masks(masks, {name: module.weight.shape for name, module in prunable(self.base).items()})
        self._names, self._masks = [], masks
        self.moves = nn.ParameterList()
        for name, parameter in self.base.named_parameters():
            trainable = parameter.requires_grad
            parameter.requires_grad_(False)
            if name in masks:
                parameter.mul_(masks[name])
            if trainable:
                self._names.append(name)
                size = int(masks[name].sum()) if name in masks else parameter.shape
                self.moves.append(torch.zeros(size, dtype=parameter.dtype, device=parameter.device))

    def train(self, mode: bool = True) -> Tangent:
        """The function that is linearised stays the one of eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.base.named_parameters())

        def function(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.base, weights, (x,))

        fixed = {name: parameters[name] for name in self._names}
        with warnings.catch_warnings():  # torch's own rules for forward mode are still scripted
            warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
            value, slope = torch.func.jvp(function, (fixed,), (self.delta(),))
        return value + slope

    def delta(self) -> dict[str, Tensor]:
        """The moves as dense tensors by parameter name, differentiable; 0 at pruned positions."""
        found = {}
        for name, move in zip(self._names, self.moves, strict=True):
            mask = self._masks.get(name)
            if mask is None:
                found[name] = move
            else:
                found[name] = torch.zeros(mask.shape, dtype=move.dtype, device=move.device).masked_scatter(
                    mask.to(move.device), move
                )
        return found

    @torch.no_grad()
    def moved(self) -> nn.Module:
        """The network itself, dense, with the weights w0 + move."""
        model = to_dense(self.base)
        parameters = dict(model.named_parameters())
        for name, move in self.delta().items():
            parameters[name].add_(move).requires_grad_(True)
        return model
