"""Masks that are 2:4 along the inputs and along the outputs, so that both W and Wᵀ run on sparse tensor cores.

The weight is cut into 4x4 tiles, and in each the best of the 90 patterns with two survivors in every row
and column is taken. Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to
Find N:M Transposable Masks" (arXiv:2102.08124) pose the problem and solve it by flows or approximately; at
this size looking at all patterns is exact and fast.
"""

from __future__ import annotations

from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["transposable_2_4"]

_CHUNK = 1 << 16  # tiles scored at a time: 47 MB of scores
_LARGEST = 1e300  # eight of them still have a sum


def transposable_2_4(scores: Tensor, alive: Tensor | None = None) -> Tensor:
    """The bool mask with the largest sum of ``scores`` that keeps 2 of 4 inputs and 2 of 4 outputs in every tile.

    Args: ``scores [out, in, *kernel]``, float without NaN, each kernel position on its own; ``alive`` bool
    of that shape: others never survive (None: all alive). Dead weights, and those that a tile would have
    beyond a ragged edge, count as 0 and take places of a pattern all the same: at most 2 are kept there.
    Ties go to the pattern that keeps the earlier weights of the tile.
    """
    if scores.numel() == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    least = min(0.0, max(float(scores.min()), -_LARGEST))
    view = scores.double().clamp(-_LARGEST, _LARGEST)
    if alive is not None:
        view = view.masked_fill(~alive, least)
    out, inputs = scores.shape[:2]
    view = view.reshape(out, inputs, -1).permute(2, 0, 1)
    view = F.pad(view, (0, -inputs % 4, 0, -out % 4), value=least)
    taps, rows, cols = view.shape
    tiles = view.reshape(taps, rows // 4, 4, cols // 4, 4).transpose(2, 3).reshape(-1, 16)
    patterns = _patterns(scores.device)
    best = torch.cat([(part @ patterns.t()).argmax(1) for part in tiles.split(_CHUNK)])
    keep = patterns[best].bool().view(taps, rows // 4, cols // 4, 4, 4).transpose(2, 3).reshape(taps, rows, cols)
    keep = keep[:, :out, :inputs].permute(1, 2, 0).reshape(scores.shape)
    return keep if alive is None else keep & alive


def _patterns(device: torch.device) -> Tensor:
    """All 4x4 patterns with two ones in every row and column, float64 ``[90, 16]``, early ones first."""
    rows = [[float(column in pair) for column in range(4)] for pair in combinations(range(4), 2)]
    every = torch.tensor(list(product(rows, repeat=4)), dtype=torch.float64)
    return every[(every.sum(1) == 2).all(1)].flatten(1).to(device)
