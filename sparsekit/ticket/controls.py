"""Controls: what a ticket is compared with, to know whether its mask, its first weights or neither matter.

Each takes first weights and masks and gives others; the generator decides, so a seed repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..mask import Masks
from ..pattern import Pattern
from ..select import select

__all__ = ["CONTROLS", "control", "noise", "parse", "random_masks", "reinit", "shuffle", "signs"]

State = dict[str, Tensor]
CONTROLS = ("reinit", "random", "shuffle", "noise", "signs", "linear")


def parse(text: str) -> tuple[str, float]:
    """``("noise", 0.5)`` of ``"noise:0.5"``; other controls take no number. Raises ValueError on unknown ones."""
    name, colon, number = text.partition(":") if isinstance(text, str) else (text, "", "")
    if name not in CONTROLS or (colon and name != "noise"):
        raise ValueError(f"Expected controls of {', '.join(CONTROLS)} (noise:SIGMAS), got {text!r}")
    try:
        return name, float(number) if colon else 1.0
    except ValueError:
        raise ValueError(f"Expected noise:SIGMAS with a number, got {text!r}") from None


def control(
    text: str,
    state: State,
    masks: Masks,
    seed: int,
    pattern: str | Pattern = "unstructured",
    fresh: State | None = None,
) -> tuple[State, Masks]:
    """Weights and masks of the control ``text`` (see :func:`parse`); ``fresh`` are newly drawn ones for ``reinit``.

    ``linear`` has the ticket's own: another network is made of them, :class:`sparsekit.ticket.tangent.Tangent`.
    """
    name, number = parse(text)
    generator = torch.Generator().manual_seed(seed)
    if name == "random":
        return state, random_masks(masks, generator, pattern)
    if name == "reinit":
        return (reinit(state, masks, generator) if fresh is None else fresh), masks
    if name == "linear":
        return state, masks
    if name == "noise":
        return noise(state, masks, generator, number), masks
    return (shuffle(state, masks, generator) if name == "shuffle" else signs(state, masks)), masks


def reinit(state: State, masks: Mapping[str, Tensor], generator: torch.Generator) -> State:
    """Each masked layer's first weights dealt out anew over all its positions: the same distribution, whatever
    it is, and no memory of the mask. Where the initialisation is at hand, draw from it instead."""
    return state | {name: _permuted(state[name], generator) for name in masks}


def random_masks(masks: Mapping[str, Tensor], generator: torch.Generator, pattern: str | Pattern = "unstructured"):
    """Masks drawn at random with as many survivors in every layer, obeying ``pattern``.

    For single weights this is a mask shuffled within its layer. Groups may differ at ragged edges, by less than one.
    """
    pattern, drawn = Pattern.parse(pattern), {}
    for name, mask in masks.items():
        scores = torch.rand(mask.shape, generator=generator).to(mask.device)
        everything = torch.ones_like(mask)
        if pattern.nm:
            drawn[name] = pattern.nm_mask(scores, everything)
        else:
            remove = mask.numel() - int(mask.sum())
            drawn |= select([name], {name: scores}, {name: everything}, pattern, remove)
    return drawn


def shuffle(state: State, masks: Mapping[str, Tensor], generator: torch.Generator) -> State:
    """First weights of the survivors exchanged among the survivors of their layer (arXiv:1803.03635, appendix F)."""
    changed = {}
    for name, mask in masks.items():
        weight = state[name].clone()
        weight[mask] = _permuted(weight[mask], generator)
        changed[name] = weight
    return state | changed


def noise(state: State, masks: Mapping[str, Tensor], generator: torch.Generator, sigmas: float = 1.0) -> State:
    """Gaussian noise of ``sigmas`` standard deviations of the layer's first weights added to them."""
    changed = {}
    for name in masks:
        weight = state[name]
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        changed[name] = (weight.double() + sigmas * weight.double().std(correction=0) * drawn).to(weight.dtype)
    return state | changed


def signs(state: State, masks: Mapping[str, Tensor]) -> State:
    """Only the signs kept: each weight becomes plus or minus its layer's standard deviation (arXiv:1905.01067)."""
    return state | {name: state[name].sign() * state[name].double().std(correction=0).to(state[name]) for name in masks}


def _permuted(tensor: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view_as(tensor)
