"""Orders of rows: rows that survive in the same columns side by side, so that panels of them read fewer columns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["panel_union", "row_order"]


def panel_union(mask: Tensor, rows: int = 8) -> float:
    """Share of the columns that some row of a panel of ``rows`` consecutive rows uses, averaged over the panels.

    ``mask``: bool ``[out, in, *kernel]``; the columns of a convolution are its (input, tap) pairs.
    """
    flat = mask.flatten(1)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -flat.shape[0] % rows))
    return float(flat.view(-1, rows, flat.shape[1]).any(1).double().mean()) if flat.numel() else 0.0


def row_order(mask: Tensor, rows: int = 8) -> Tensor:
    """An order of a mask's rows in which panels of ``rows`` consecutive rows share many columns.

    Greedy clustering: a panel starts with the row that has most survivors of those left and takes, until it is
    full, the row that shares most columns with it beyond what a random row of as many survivors would (a better
    measure here than Jaccard's, which prefers short rows). Ties go to the lower index. Exchanging rows afterwards
    gains a quarter of a percent at ten times the cost, so nothing is exchanged.

    Args: ``mask`` bool ``[out, in, *kernel]``, ``rows`` the panel's height. Returns: int64 ``[out]``, the old row
    of every new one. 1024 rows of 1024 take about 40 ms.
    """
    flat = mask.flatten(1).cpu().numpy()
    count, columns = flat.shape
    by_column = np.ascontiguousarray(flat.T).astype(np.float32)
    sizes = flat.sum(1).astype(np.float32)
    left = np.ones(count, bool)
    order = np.empty(count, np.int64)
    for start in range(0, count, rows):
        row = int(np.where(left, sizes, -1).argmax())
        union = np.zeros(columns, bool)
        shared = np.zeros(count, np.float32)  # columns of each row that the panel already reads
        for place in range(start, min(start + rows, count)):
            if place > start:
                above_chance = shared - sizes * np.float32(union.sum() / max(1, columns))
                row = int(np.where(left, above_chance, -np.inf).argmax())
            order[place], left[row] = row, False
            fresh = flat[row] & ~union
            union |= fresh
            shared += by_column[fresh].sum(0)
    return torch.from_numpy(order)
