"""Criteria that ask what the loss, the flow of signal or the activations would miss."""

from __future__ import annotations

from torch import Tensor

from .base import Layer, criterion


@criterion
def snip(layer: Layer) -> Tensor:
    """``|w dL/dw|``, connection sensitivity (Lee et al., arXiv:1810.02340); all of ``data`` counts."""
    return (layer.weight * layer.grad).abs()


@criterion
def grasp(layer: Layer) -> Tensor:
    """w (H g): what the gradient's norm loses without w goes last (Wang et al., arXiv:2002.07376, equation 8).

    The authors divide logits by 200 before the loss: ``loss=lambda out, y: cross_entropy(out / 200, y)``.
    """
    return layer.weight * layer.hessian_grad


@criterion
def taylor(layer: Layer) -> Tensor:
    """(w dL/dw)^2, the first-order change of the loss (Molchanov et al., arXiv:1906.10771, equation 8)."""
    return (layer.weight * layer.grad).square()


@criterion(steps=100)
def synflow(layer: Layer) -> Tensor:
    """``|w| dR/d|w|``, synaptic flow (Tanaka et al., arXiv:2006.05467): float64, 100 steps, ``scope="global"``."""
    return layer.weight.double().abs() * layer.flow


@criterion
def wanda(layer: Layer) -> Tensor:
    """``|w|`` times the root mean square of its input (Sun et al., arXiv:2306.11695, without their per-row ranking)."""
    return layer.weight.abs() * layer.input_rms
