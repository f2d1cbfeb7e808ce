"""Weights as bitmaps: masks to index tensors and back, in plain torch, on any device.

A weight, viewed as ``[out, in * kernel]``, is cut into tiles of 8 x 8, which stick out where the extents are
ragged. Bit ``8 r + c`` of a tile's bitmap tells whether row r, column c survives. ``values`` holds the
survivors tile row by tile row, tile by tile, row by row of a tile; a *run* is what 16 neighbouring tiles of
one tile row hold, and ``offsets`` says where each run starts. That is 1 bit a weight, and 1/32 for offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import layout as blocks

SIDE = 8
"""Rows and columns of a tile."""
RUN = 16
"""Tiles of a run, all in one tile row."""


def grid(shape: torch.Size) -> tuple[int, int, int]:
    """Tile rows, tile columns, and runs of each tile row of a weight of ``shape``."""
    columns = int(torch.Size(shape[1:]).numel())
    tile_columns = -(-columns // SIDE)
    return -(-shape[0] // SIDE), tile_columns, -(-tile_columns // RUN)


def index(mask: Tensor) -> dict[str, Tensor]:
    """``bitmap int64 [tile rows, tile columns]`` and ``offsets int32 [runs + 1]`` of a bool mask."""
    tiles = blocks.blocks(mask.flatten(1), (SIDE, SIDE))
    bitmap = (tiles << _bits(mask.device)).sum(3, dtype=torch.uint8)  # a byte for each row of a tile
    bitmap = bitmap.contiguous().view(torch.int64).squeeze(-1)
    return {"bitmap": bitmap, "offsets": offsets(bitmap).to(torch.int32)}


def offsets(bitmap: Tensor) -> Tensor:
    """Where each run starts in ``values``, int64 ``[runs + 1]``."""
    counts = alive(bitmap).sum((2, 3))
    rows, columns = bitmap.shape
    counts = torch.nn.functional.pad(counts, (0, -columns % RUN))
    ends = counts.view(rows, counts.shape[1] // RUN, RUN).sum(2).flatten().cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def alive(bitmap: Tensor) -> Tensor:
    """The bits, bool ``[tile rows, tile columns, 8, 8]``."""
    rows = bitmap.contiguous().unsqueeze(-1).view(torch.uint8).unsqueeze(-1)
    return (rows >> _bits(bitmap.device) & 1).bool()


def _bits(device: torch.device) -> Tensor:
    return torch.arange(SIDE, dtype=torch.uint8, device=device)


def mask(bitmap: Tensor, shape: torch.Size) -> Tensor:
    """The bool mask of ``shape``."""
    return _flat(alive(bitmap), shape)


def _flat(tiles: Tensor, shape: torch.Size) -> Tensor:
    return blocks.unblocks(tiles, torch.Size((shape[0], torch.Size(shape[1:]).numel()))).view(shape)


def gather(weight: Tensor, bitmap: Tensor, count: int | None = None) -> Tensor:
    """The survivors of a dense weight, ``[nnz]``; where ``count`` says how many, nothing waits for the device."""
    if count is None:
        count = int(alive(bitmap).sum())
    place = alive(bitmap).flatten().nonzero_static(size=count).squeeze(1)
    return blocks.blocks(weight.flatten(1), (SIDE, SIDE)).flatten()[place]


def scatter(values: Tensor, bitmap: Tensor, shape: torch.Size) -> Tensor:
    """The dense weight of ``shape``, 0 where pruned."""
    bits = alive(bitmap)
    return _flat(values.new_zeros(bits.shape).masked_scatter(bits, values), shape)


def check(values: Tensor, bitmap: Tensor, found: Tensor, shape: torch.Size) -> str | None:
    """Why the parts are no bitmap weight of ``shape`` (kernels read through them unchecked), or None."""
    rows, columns, runs = grid(shape)
    if bitmap.dtype != torch.int64 or found.dtype != torch.int32:
        return f"an int64 bitmap and int32 offsets, got {bitmap.dtype} and {found.dtype}"
    if bitmap.shape != (rows, columns) or found.shape != (rows * runs + 1,) or values.dim() != 1:
        return (
            f"a bitmap [{rows}, {columns}], offsets [{rows * runs + 1}] and values [survivors], got "
            f"{list(bitmap.shape)}, {list(found.shape)}, {list(values.shape)}"
        )
    bits = alive(bitmap)
    inside = blocks.blocks(bits.new_ones(shape).flatten(1), (SIDE, SIDE))
    if bool((bits & ~inside).any()):
        return f"bits of weights inside {list(shape)}, got others"
    if not torch.equal(offsets(bitmap), found.long()):
        return "offsets that follow from the bitmap, got others"
    if values.numel() != int(found[-1]):
        return f"{int(found[-1])} values, got {values.numel()}"
    return None
