"""From 2:4 masks to ``values`` and ``choice`` and back; plain torch, on any device.

A weight ``[out, in]`` is cut into groups of four consecutive inputs, of which at most two survive. A code
of ``choice`` holds their two positions, the lower in bits 0-1, the higher in bits 2-3; a group with fewer
survivors names its lowest free positions as well, and those slots of ``values`` hold 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
"""The six pairs of ascending positions."""


def refusal(mask: Tensor, groups: int = 1) -> str | None:
    """Why a mask cannot be stored as 2:4, or None."""
    if groups != 1:
        return "grouped convolution"
    if mask.dim() not in (2, 4) or any(extent != 1 for extent in mask.shape[2:]):
        return f"a kernel of {'x'.join(map(str, mask.shape[2:]))}; 2:4 is for linear layers and 1x1 convolutions"
    if mask.shape[1] % 4:
        return f"{mask.shape[1]} inputs, no multiple of 4"
    if not _holds(mask.flatten(1)):
        return "more than 2 survivors in a group of 4 inputs; prune with pattern '2:4'"
    return None


def index(mask: Tensor) -> dict[str, Tensor]:
    """``choice``, the bool ``mask`` of the slots where some are free, ``t_choice`` where the transpose is 2:4 too."""
    flat = mask.flatten(1)
    choice, slots = _code(flat)
    found = {"choice": choice}
    if not bool(slots.all()):
        found["mask"] = slots
    if flat.shape[0] % 4 == 0 and _holds(flat.t()):
        found["t_choice"] = _code(flat.t())[0]
    return found


def positions(choice: Tensor) -> Tensor:
    """Where in its group each slot stands, int64 ``[out, in/4, 2]``."""
    return torch.stack([choice & 3, choice >> 2 & 3], -1).long()


def gather(weight: Tensor, choice: Tensor) -> Tensor:
    """The slots ``[out, in/2]`` of a dense ``weight [out, in]``."""
    out, groups = choice.shape
    return weight.reshape(out, groups, 4).gather(2, positions(choice)).view(out, 2 * groups)


def scatter(values: Tensor, choice: Tensor) -> Tensor:
    """The dense weight ``[out, in]``, 0 where no slot stands."""
    out, groups = choice.shape
    dense = values.new_zeros(out, groups, 4).scatter(2, positions(choice), values.reshape(out, groups, 2))
    return dense.view(out, 4 * groups)


def check(values: Tensor, index: dict[str, Tensor], shape: torch.Size) -> str | None:
    """Why the parts are no 2:4 weight of ``shape``, or None."""
    if len(shape) not in (2, 4) or tuple(shape[2:]) not in ((), (1, 1)) or shape[1] % 4:
        return f"a linear or 1x1 weight of a multiple of 4 inputs for the 2:4 format, got one of shape {list(shape)}"
    choice, mask, t_choice = index["choice"], index.get("mask"), index.get("t_choice")
    slots, codes = (shape[0], shape[1] // 2), (shape[0], shape[1] // 4)
    if choice.shape != codes or choice.dtype != torch.uint8 or values.shape != slots:
        return (
            f"values {list(slots)} and a uint8 choice {list(codes)}, "
            f"got {list(values.shape)} and {choice.dtype} {list(choice.shape)}"
        )
    if not bool(torch.isin(choice, torch.tensor(CODES, dtype=torch.uint8, device=choice.device)).all()):
        return "a choice of two ascending positions in every group, got others"
    if mask is not None and (mask.shape != slots or mask.dtype != torch.bool):
        return f"a bool mask of shape {list(slots)}, got {mask.dtype} {list(mask.shape)}"
    if mask is not None and bool((values.detach()[~mask] != 0).any()):
        return "values that are 0 where the mask is False, got others"
    if t_choice is not None:
        alive = scatter(torch.ones(slots, dtype=torch.bool, device=choice.device) if mask is None else mask, choice)
        if shape[0] % 4 or not _holds(alive.t()) or not torch.equal(t_choice, _code(alive.t())[0]):
            return "the t_choice that follows from choice, got another"
    return None


def _holds(mask: Tensor) -> bool:
    """Whether every four neighbours of a row hold at most two survivors."""
    rows, cols = mask.shape
    return bool((mask.reshape(rows, cols // 4, 4).sum(2) <= 2).all())


def _code(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a 2:4 mask ``[rows, cols]``, and which of their slots ``[rows, cols/2]`` survive."""
    rows, cols = mask.shape
    view = mask.reshape(rows, cols // 4, 4)
    order = view.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices  # survivors, then the free ones
    pair = order[..., :2].sort(2).values
    choice = (pair[..., 0] | pair[..., 1] << 2).to(torch.uint8)
    return choice, view.gather(2, pair).reshape(rows, cols // 2)
