"""Patterns: the structure a mask must obey.

A weight is seen as ``[out, taps, in]``: a linear weight ``[out, in]`` has one tap, a convolution weight
``[out, in/groups, kh, kw]`` has ``kh * kw``. Blocks and N:M groups lie in the (out, in) plane of one
tap, so a block never straddles two kernel positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .transposable import transposable_2_4

__all__ = ["Pattern"]

_BLOCK = re.compile(r"block:([1-9]\d*)x([1-9]\d*)")
_NM = re.compile(r"([1-9]\d*):([1-9]\d*)")


@dataclass(frozen=True)
class Pattern:
    """One structure: ``unstructured``, ``block:RxC``, ``N:M`` (N of every M inputs survive), ``channel``.

    ``2:4t`` is 2:4 along the inputs and along the outputs, so that the input gradient is 2:4 as well.

    ``group`` is the (out, in) extent that lives or dies together; ragged edges form smaller groups.
    """

    name: str
    group: tuple[int, int] = (1, 1)
    nm: tuple[int, int] | None = None
    transposable: bool = False

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read a pattern's name; raises ValueError with the list of known ones."""
        if isinstance(text, Pattern):
            return text
        if text in ("unstructured", "channel"):
            return cls(text)
        if isinstance(text, str):
            if match := _BLOCK.fullmatch(text):
                return cls(text, group=(int(match[1]), int(match[2])))
            if text == "2:4t":
                return cls(text, nm=(2, 4), transposable=True)
            if (match := _NM.fullmatch(text)) and int(match[1]) <= int(match[2]):
                return cls(text, nm=(int(match[1]), int(match[2])))
        raise ValueError(
            f"Expected a pattern 'unstructured', 'block:RxC', 'N:M' with N <= M, '2:4t' or 'channel', got {text!r}"
        )

    def __str__(self) -> str:
        return self.name

    def group_scores(self, scores: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Sum scores over the groups that are pruned together.

        Args: ``scores`` float of the weight's shape, ``alive`` bool of the same shape.
        Returns: ``(group scores, group alive)``, both flat, in row-major order of the groups. Not for
        N:M, whose groups compete inside themselves (:meth:`nm_mask`).
        """
        scores, any_alive = _taps(scores.masked_fill(~alive, 0)), _taps(alive)
        if self.name == "channel":
            return scores.sum((1, 2)), any_alive.any(2).any(1)
        rows, cols = self.group
        if (rows, cols) == (1, 1):
            return scores.flatten(), any_alive.flatten()
        return _blocks(scores, rows, cols).sum((2, 4)).flatten(), _blocks(any_alive, rows, cols).any(4).any(2).flatten()

    def expand(self, keep: Tensor, shape: torch.Size) -> Tensor:
        """Turn a flat bool per group into a bool mask of the weight's ``shape``."""
        out, taps, cols = _taps_shape(shape)
        if self.name == "channel":
            return keep.view(out, *[1] * (len(shape) - 1)).expand(shape).clone()
        rows, width = self.group
        grid = keep.view(-(-out // rows), taps, -(-cols // width))
        mask = grid.repeat_interleave(rows, 0)[:out].repeat_interleave(width, 2)[:, :, :cols]
        return _untaps(mask, shape)

    def nm_mask(self, scores: Tensor, alive: Tensor) -> Tensor:
        """Keep the N best of every M consecutive inputs (ties to the lower index); bool of the weight's shape."""
        if self.transposable:
            return transposable_2_4(scores, alive)
        n, m = self.nm
        view = torch.where(_taps(alive), _taps(scores), -torch.inf)
        out, taps, cols = view.shape
        padded = torch.full((out, taps, -(-cols // m) * m), -torch.inf, dtype=view.dtype, device=view.device)
        padded[:, :, :cols] = view
        order = padded.view(out, taps, -1, m).sort(dim=-1, descending=True, stable=True).indices
        keep = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        keep.scatter_(-1, order[..., :n], True)
        return _untaps(keep.view(out, taps, -1)[:, :, :cols] & _taps(alive), scores.shape)

    def holds(self, mask: Tensor) -> bool:
        """Whether a bool mask obeys the pattern."""
        if self.nm:
            return self._holds_nm(mask) and (not self.transposable or self._holds_nm(mask.transpose(0, 1)))
        _, alive = self.group_scores(mask.float(), mask)
        return bool((self.expand(alive, mask.shape) == mask).all())

    def _holds_nm(self, mask: Tensor) -> bool:
        n, m = self.nm
        view = torch.nn.functional.pad(_taps(mask), (0, -mask.shape[1] % m))
        return bool((view.reshape(*view.shape[:2], -1, m).sum(-1) <= n).all())


def _taps_shape(shape: torch.Size) -> tuple[int, int, int]:
    taps = 1
    for extent in shape[2:]:
        taps *= extent
    return shape[0], taps, shape[1]


def _taps(weight: Tensor) -> Tensor:
    """``[out, in, *kernel]`` to ``[out, taps, in]``."""
    return weight.reshape(weight.shape[0], weight.shape[1], -1).transpose(1, 2)


def _untaps(view: Tensor, shape: torch.Size) -> Tensor:
    return view.transpose(1, 2).reshape(shape).contiguous()


def _blocks(view: Tensor, rows: int, cols: int) -> Tensor:
    """``[out, taps, in]`` padded to ``[out/R, taps, R, in/C, C]`` as (gr, taps, R, gc, C)."""
    out, _, width = view.shape
    view = torch.nn.functional.pad(view, (0, -width % cols, 0, 0, 0, -out % rows))
    out, taps, width = view.shape
    return view.view(out // rows, rows, taps, width // cols, cols).permute(0, 2, 1, 3, 4)
