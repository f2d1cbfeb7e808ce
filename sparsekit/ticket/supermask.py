"""Strong lottery tickets: the weights stay as they were drawn, and a mask is trained instead.

Edge-popup: Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", arXiv:1911.13299.
Bernoulli supermasks: Zhou et al., "Deconstructing Lottery Tickets", arXiv:1905.01067, section 5. Scores of all weights
are trained, so this is dense work; what :func:`harvest` gives is a mask like any other and runs sparse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from math import floor, log, sqrt

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..mask import Masks
from ..prune import prunable

__all__ = ["KINDS", "harvest", "supermask"]

KINDS = ("edge-popup", "bernoulli")


def supermask(
    model: nn.Module,
    density: float = 0.5,
    kind: str = "edge-popup",
    *,
    constant: bool = True,
    exclude: Iterable[str] = (),
    seed: int = 0,
) -> nn.Module:
    """A copy of a dense ``model`` whose only trainable parameters are scores, one per prunable weight.

    Args:
        density: ``"edge-popup"`` keeps exactly that share of each layer, of the largest scores in size; a
            ``"bernoulli"`` mask begins there and ends where training leads it.
        kind: ``"edge-popup"`` passes gradients straight through the selection; ``"bernoulli"`` keeps each weight
            with probability sigmoid(score), drawn anew in every forward pass from torch's generator, in eval
            mode where that exceeds 1/2, and multiplies by the inverse of the share kept.
        constant: weights become plus or minus one constant per layer: sqrt(2 / (density fan_in)) for edge-popup
            (signed Kaiming constant), the layer's own standard deviation for Bernoulli masks.
        exclude: fnmatch patterns of layers to leave as they are, frozen too. ``seed`` draws the first scores.

    Train it with any loop (the paper: SGD 0.1, momentum 0.9, cosine). Raises: ValueError on bad arguments.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected a supermask of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"Expected a density above 0, at most 1, got {density!r}")
    for name, module in prunable(model, exclude).items():
        if hasattr(module, "survivors") or hasattr(module, "weight_orig"):
            raise ValueError(f"{name}: Expected a dense weight, got a pruned one; sparsekit.to_dense gives it back")
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in prunable(model, exclude).values():
        weight = module.weight
        if constant:
            with torch.no_grad():
                weight.copy_(weight.sign() * _constant(weight, density, kind))
        mask = EdgePopup(weight, density, generator) if kind == "edge-popup" else Bernoulli(weight, density)
        parametrize.register_parametrization(module, "weight", mask)
    return model


def harvest(model: nn.Module) -> tuple[nn.Module, Masks]:
    """A dense copy without scores, its weights frozen no more, and the masks that were found.

    ``sparsekit.convert(*harvest(model))`` computes what ``model`` does in eval mode, sparse. Raises ValueError on a
    model without supermasks.
    """
    model, masks = copy.deepcopy(model).eval(), {}
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module, "weight"):
            mask = module.parametrizations.weight[0]
            if isinstance(mask, _Scores):
                masks[f"{name}.weight" if name else "weight"] = mask.mask()
                _plain(module)
    if not masks:
        raise ValueError(f"Expected a model that supermask() made, got {type(model).__name__} without scores")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, masks


def _plain(module: nn.Module) -> None:
    """What torch's ``remove_parametrizations`` does, but it takes the class of ``module`` from all its copies."""
    weight, bias = nn.Parameter(module.weight.detach().clone()), module._parameters.pop("bias", None)
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    module.register_parameter("weight", weight)
    module.register_parameter("bias", bias)


class _Scores(nn.Module):
    """A parametrization that multiplies a frozen weight by a mask of trained ``scores``."""

    scores: nn.Parameter

    def mask(self) -> Tensor:
        """The bool mask as it stands, of the weight's shape."""
        raise NotImplementedError


class EdgePopup(_Scores):
    """The ``density`` highest |scores|, ties to the lower index; first scores Kaiming uniform, as the authors'."""

    def __init__(self, weight: Tensor, density: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / sqrt(max(1, weight[0].numel()))
        first = (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
        self.scores = nn.Parameter(first.to(weight.device, weight.dtype))
        self.count = floor(density * weight.numel() + 0.5)

    def mask(self) -> Tensor:
        size = self.scores.detach().abs().flatten()
        if not self.count:
            return torch.zeros_like(self.scores, dtype=torch.bool)
        least = size.kthvalue(size.numel() - self.count + 1).values  # a sort would take most of the step
        mask = size > least
        mask[(size == least).nonzero().flatten()[: self.count - int(mask.sum())]] = True
        return mask.view_as(self.scores)

    def forward(self, weight: Tensor) -> Tensor:
        size = self.scores.abs()
        return weight * (self.mask().to(weight.dtype) + size - size.detach())


class Bernoulli(_Scores):
    """Each weight kept with probability sigmoid(score), the rest scaled up to make up for the dead."""

    def __init__(self, weight: Tensor, density: float) -> None:
        super().__init__()
        first = log(density / (1 - density)) if density < 1 else 10.0
        self.scores = nn.Parameter(torch.full_like(weight, first))

    def mask(self) -> Tensor:
        return self.scores.detach() > 0

    def forward(self, weight: Tensor) -> Tensor:
        share = torch.sigmoid(self.scores)
        kept = (torch.bernoulli(share.detach()) if self.training else self.mask()).to(weight.dtype)
        scale = kept.numel() / kept.sum().clamp(min=1)
        return weight * (kept + share - share.detach()) * scale


def _constant(weight: Tensor, density: float, kind: str) -> float:
    if kind == "edge-popup":
        return sqrt(2 / (density * max(1, weight[0].numel())))
    return float(weight.double().std(correction=0))
