"""Data-parallel training: every rank under the masks and in the formats of rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..mask import Masks
from ..nn import convert as convert_here
from ..nn import masks_of
from ..ticket import ranks
from ..ticket.round import formats_of

__all__ = ["check_masks_agree", "convert"]


def convert(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    training: bool = True,
    impl: str | Mapping[str, str] = "auto",
) -> nn.Module:
    """:func:`sparsekit.convert` on every rank of the default process group, before DDP or ``fully_shard``.

    Formats are chosen by the clock and criteria may draw random numbers, so ranks that converted by themselves
    could hold parameters of different shapes: here rank 0 chooses, and the others take its masks (theirs may be
    None) and formats. To be called by all ranks; returns a sparse copy of each rank's own ``model``.
    """
    kept: list[nn.Module] = []

    def choose() -> tuple[Masks, dict[str, str]]:
        kept.append(convert_here(model, masks, example_inputs, training, impl))
        return {name: mask.cpu() for name, mask in masks_of(kept[0]).items()}, formats_of(kept[0])

    chosen, formats = ranks.from_first(choose)
    if kept:
        return kept[0]
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    return convert_here(model, {name: mask.to(where) for name, mask in chosen.items()}, None, training, formats)


def check_masks_agree(model: nn.Module) -> str:
    """The digest of the masks of a converted model; raises ValueError on every rank unless all hold the same."""
    return ranks.agree(masks_of(model))
