"""Criteria that look at weights alone: magnitude, Zhou's family, and importance within a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Layer, criterion

# Zhou et al., "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask", arXiv:1905.01067, section 3:
# a criterion is a function of a weight's first and last value.


@criterion
def magnitude(layer: Layer) -> Tensor:
    """``|w|``, the criterion of iterative magnitude pruning (Frankle & Carbin, arXiv:1803.03635)."""
    return layer.weight.abs()


@criterion
def random(layer: Layer) -> Tensor:
    """Uniform scores from torch's global generator: the random-sparsity control."""
    return torch.rand(layer.weight.shape, device=layer.weight.device)


@criterion
def small_final(layer: Layer) -> Tensor:
    """``-|w|``: the reverse of magnitude."""
    return -layer.weight.abs()


@criterion
def large_init(layer: Layer) -> Tensor:
    """``|w0|``."""
    return layer.init.abs()


@criterion
def small_init(layer: Layer) -> Tensor:
    """``-|w0|``."""
    return -layer.init.abs()


@criterion
def large_init_large_final(layer: Layer) -> Tensor:
    """``min(a|w|, |w0|)``, a bringing the layer's mean ``|w|`` to its mean ``|w0|``."""
    first, last = _same_scale(layer)
    return torch.minimum(first, last)


@criterion
def small_init_small_final(layer: Layer) -> Tensor:
    """``-max(a|w|, |w0|)``, a bringing the layer's mean ``|w|`` to its mean ``|w0|``."""
    first, last = _same_scale(layer)
    return -torch.maximum(first, last)


@criterion
def magnitude_increase(layer: Layer) -> Tensor:
    """``|w| - |w0|``."""
    return layer.weight.abs() - layer.init.abs()


@criterion
def movement(layer: Layer) -> Tensor:
    """``|w - w0|``."""
    return (layer.weight - layer.init).abs()


@criterion
def large_final_same_sign(layer: Layer) -> Tensor:
    """``|w|`` where training kept the sign of w0, ``-|w|`` where it did not."""
    return layer.weight.abs() * _stayed(layer)


@criterion
def large_final_diff_sign(layer: Layer) -> Tensor:
    """``|w|`` where training turned the sign of w0, ``-|w|`` where it did not."""
    return -layer.weight.abs() * _stayed(layer)


@criterion
def movement_same_sign(layer: Layer) -> Tensor:
    """``|w - w0|`` where training kept the sign of w0, ``-|w - w0|`` where it did not."""
    return (layer.weight - layer.init).abs() * _stayed(layer)


def _stayed(layer: Layer) -> Tensor:
    return torch.where(layer.weight * layer.init > 0, 1.0, -1.0).to(layer.weight.dtype)


def _same_scale(layer: Layer) -> tuple[Tensor, Tensor]:
    first, last = layer.init.abs(), layer.weight.abs()
    scale = first[layer.alive].sum() / last[layer.alive].sum().clamp(min=torch.finfo(last.dtype).tiny)
    return first, last * scale


# Importance within the layer, ranked globally. What is left of a layer shares a fixed sum, so pruned in rounds (or
# ``steps=``) a layer gains as it shrinks and is not emptied because its weights are small. L1, L2, softmax and
# min-max: "The Lottery Ticket Hypothesis with layerwise importance", arXiv:2302.11244; LAMP: Lee et al.,
# arXiv:2010.07611.


@criterion
def layer_l1(layer: Layer) -> Tensor:
    """``|w|`` as a share of the sum over the layer's survivors; rank it with ``scope="global"``."""
    size = _alive_magnitude(layer)
    return size / _positive(size.sum())


@criterion
def layer_l2(layer: Layer) -> Tensor:
    """w^2 as a share of the sum over the layer's survivors; rank it with ``scope="global"``."""
    size = _alive_magnitude(layer).square()
    return size / _positive(size.sum())


@criterion
def layer_softmax(layer: Layer) -> Tensor:
    """``exp|w|`` as a share of the sum over the layer's survivors; rank it with ``scope="global"``."""
    size = _alive_magnitude(layer).masked_fill(~layer.alive, -torch.inf)
    return torch.softmax(size.flatten(), 0).nan_to_num(0.0).view_as(size)  # NaN where nothing is alive


@criterion
def layer_minmax(layer: Layer) -> Tensor:
    """``|w|`` from 0 for the least to 1 for the largest of the layer's survivors; rank it with ``scope="global"``."""
    size = _alive_magnitude(layer)
    if not bool(layer.alive.any()):
        return size
    least, most = size[layer.alive].aminmax()
    if least == most:
        return torch.ones_like(size)
    return (size - least) / (most - least)


@criterion
def lamp(layer: Layer) -> Tensor:
    """w^2 over the sum of w^2 of all survivors of the layer that are no smaller; rank with ``scope="global"``."""
    size = _alive_magnitude(layer).square().flatten()
    order = size.argsort(stable=True)
    rest = size[order].flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(size)
    scores[order] = size[order] / rest.clamp(min=torch.finfo(size.dtype).tiny)
    return scores.view_as(layer.weight)


def _alive_magnitude(layer: Layer) -> Tensor:
    return layer.weight.abs().double() * layer.alive


def _positive(total: Tensor) -> Tensor:
    return total.clamp(min=torch.finfo(total.dtype).tiny)
