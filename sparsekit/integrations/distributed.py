"""Data-parallel training: every rank under the masks and in the formats of rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mask import Masks, digest
from ..nn import SparseModule, masks_of
from ..nn import convert as convert_here

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
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        fast = convert_here(model, masks, example_inputs, training, impl)
        layers = {name: module for name, module in fast.named_modules() if isinstance(module, SparseModule)}
        held: Masks = {name: mask.cpu() for name, mask in masks_of(fast).items()}
        message = [held, {name: module.format.name for name, module in layers.items()}]
    dist.broadcast_object_list(message, src=0)
    if dist.get_rank() == 0:
        return fast
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    return convert_here(model, {name: m.to(where) for name, m in message[0].items()}, None, training, message[1])


def check_masks_agree(model: nn.Module) -> str:
    """The digest of the masks of a converted model; raises ValueError on every rank unless all hold the same."""
    own = digest({name: mask.cpu() for name, mask in masks_of(model).items()})
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if odd := [rank for rank, other in enumerate(found) if other != found[0]]:
        raise ValueError(f"Expected the masks of rank 0 on every rank, got others on {odd}")
    return own
