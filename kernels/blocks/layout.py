"""Weights in blocks, for the formats that keep them: masks to index tensors and back, in plain torch.

A weight ``[out, in/groups, kh, kw]`` (linear: one tap, one group) is cut into ``R x C`` blocks: R outputs
of one group by C inputs of one tap. The last block of a group or tap sticks out where the extents are
ragged; what sticks out is stored as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_OVERHANG = 1.25
_RUN = 256  # inputs that one run of blocks spans: as wide a product as the weight gradient's kernel makes


class Grid(NamedTuple):
    """How a weight falls into blocks: ``[groups * rows]`` block rows of ``taps * cols`` places."""

    groups: int
    rows: int  # block rows of a group
    cols: int  # block columns of a tap
    taps: int
    block: tuple[int, int]
    out: int  # outputs of a group
    inputs: int  # inputs of a group


def grid(shape: torch.Size, block: tuple[int, int], groups: int = 1) -> Grid:
    """The grid of a weight of ``shape``."""
    out, inputs = shape[0] // groups, shape[1]
    taps = int(torch.Size(shape[2:]).numel())
    return Grid(groups, -(-out // block[0]), -(-inputs // block[1]), taps, tuple(block), out, inputs)


def blocks(weight: Tensor, block: tuple[int, int], groups: int = 1) -> Tensor:
    """``[groups * rows, taps * cols, R, C]`` of a dense weight, zero where blocks stick out; a copy."""
    g = grid(weight.shape, block, groups)
    r, c = g.block
    view = weight.reshape(g.groups, g.out, g.inputs, g.taps)
    view = torch.nn.functional.pad(view, (0, 0, 0, g.cols * c - g.inputs, 0, g.rows * r - g.out))
    view = view.reshape(g.groups, g.rows, r, g.cols, c, g.taps).permute(0, 1, 5, 3, 2, 4)
    return view.reshape(g.groups * g.rows, g.taps * g.cols, r, c)


def unblocks(tiles: Tensor, shape: torch.Size, groups: int = 1) -> Tensor:
    """The inverse of :func:`blocks`."""
    g = grid(shape, tuple(tiles.shape[2:]), groups)
    r, c = g.block
    view = tiles.reshape(g.groups, g.rows, g.taps, g.cols, r, c).permute(0, 1, 4, 3, 5, 2)
    view = view.reshape(g.groups, g.rows * r, g.cols * c, g.taps)[:, : g.out, : g.inputs]
    return view.reshape(shape)


def fill(mask: Tensor, block: tuple[int, int], groups: int = 1) -> float:
    """Share of survivors among the entries of the blocks they touch; 0.0 where no survivor is."""
    g = grid(mask.shape, block, groups)
    kept = alive(mask, block, groups).view(g.groups, g.rows, g.taps, g.cols).sum((0, 2))
    rows, cols = (
        torch.full((count,), side).index_fill_(0, torch.tensor([count - 1]), extent - (count - 1) * side)
        for count, side, extent in ((g.rows, block[0], g.out), (g.cols, block[1], g.inputs))
    )
    stored = int((kept * rows.to(kept.device)[:, None] * cols.to(kept.device)).sum())
    return int(mask.count_nonzero()) / max(stored, 1)


def alive(mask: Tensor, block: tuple[int, int], groups: int = 1) -> Tensor:
    """``[groups * rows, taps * cols]`` bool: the blocks that hold a survivor."""
    g = grid(mask.shape, block, groups)
    r, c = g.block
    view = mask.reshape(g.groups, g.out, g.inputs, g.taps)
    if overhang := g.rows * r - g.out:
        view = torch.nn.functional.pad(view, (0, 0, 0, 0, 0, overhang))
    view = _any(view.reshape(g.groups, g.rows, r, g.inputs, g.taps), 2)  # what is left is r times smaller
    if overhang := g.cols * c - g.inputs:
        view = torch.nn.functional.pad(view, (0, 0, 0, overhang))
    view = _any(view.reshape(g.groups, g.rows, g.cols, c, g.taps), 3)
    return view.transpose(2, 3).reshape(g.groups * g.rows, g.taps * g.cols)


def best_block(mask: Tensor, families: Sequence[Sequence[tuple[int, int]]], groups: int = 1) -> tuple[int, int] | None:
    """The first block, family by family, of which each survives or dies whole; None where there is none.

    The last block of a family has sides that divide those of the others. A block may stick out of a ragged
    weight by a quarter of the survivors at most, unless it is the last of its family.
    """
    for family in families:
        rows, cols = small = family[-1]
        if not holds(mask, small, groups):
            continue  # the others are unions of these, so none of them holds either
        limit = _OVERHANG * int(mask.count_nonzero())
        g = grid(mask.shape, small, groups)
        cells = alive(mask, small, groups)  # whole cells from here on, far fewer than entries
        cells = cells.view(g.groups * g.rows, g.taps, g.cols).transpose(1, 2)
        for block in family[:-1]:
            inner = (block[0] // rows, block[1] // cols)
            if not holds(cells, inner, groups):
                continue
            if int(alive(cells, inner, groups).sum()) * block[0] * block[1] <= limit:
                return block
        return small
    return None


def holds(mask: Tensor, block: tuple[int, int], groups: int = 1) -> bool:
    """Whether every block survives or dies whole."""
    if mask.numel() == 0:
        return True
    g = grid(mask.shape, block, groups)
    view = mask.reshape(g.groups, g.out, g.inputs, g.taps)
    for strips in _cut(view, 1, block[0]):
        if not _uniform(strips, 2) or not all(_uniform(cells, 3) for cells in _cut(strips[:, :, 0], 2, block[1])):
            return False
    return True


def _cut(view: Tensor, axis: int, side: int) -> list[Tensor]:
    """``view`` with an axis cut into pieces of ``side``, and what is left over as one smaller piece."""
    whole = view.shape[axis] // side * side
    parts = (view.narrow(axis, 0, whole), side), (view.narrow(axis, whole, view.shape[axis] - whole), 0)
    return [part.unflatten(axis, (-1, side or part.shape[axis])) for part, side in parts if part.shape[axis]]


def _any(view: Tensor, axis: int) -> Tensor:
    """``view.any(axis)`` of a bool tensor, which torch finds fifty times faster as the maximum of bytes."""
    return view.view(torch.uint8).amax(axis).view(torch.bool) if view.numel() else view.any(axis)


def _uniform(view: Tensor, axis: int) -> bool:
    """Whether all of ``view [group, row, ...]`` is equal along an axis."""
    if view.shape[axis] == 1:
        return True
    # The first rows tell an unstructured mask; only a mask that passes is read whole.
    parts = (part.narrow(axis, 0, 1) == part.narrow(axis, 1, part.shape[axis] - 1) for part in (view[:, :2], view))
    return all(bool(part.all()) for part in parts)


def index(mask: Tensor, block: tuple[int, int], groups: int = 1) -> dict[str, Tensor]:
    """``crow_indices``, ``col_indices``, ``row_order``, ``runs`` of the blocks that hold a survivor."""
    kept = alive(mask, block, groups)
    crow = _offsets(kept.sum(1))
    col = kept.nonzero()[:, 1].to(torch.int32).contiguous()
    return {"crow_indices": crow, "col_indices": col, **schedule(crow, block)}


def schedule(crow_indices: Tensor, block: tuple[int, int]) -> dict[str, Tensor]:
    """The launch order of block rows, and the runs of neighbouring blocks that make one gradient product."""
    counts = crow_indices.diff()
    width = max(1, _RUN // block[1])
    per_row = (counts + width - 1) // width
    row = torch.repeat_interleave(per_row.long())
    nth = torch.arange(row.numel(), device=row.device) - (per_row.cumsum(0) - per_row)[row]
    runs = torch.stack([row, crow_indices[:-1].long()[row] + nth * width], 1)
    return {"row_order": _longest_first(counts), "runs": runs.to(torch.int32)}


def transposed(crow_indices: Tensor, col_indices: Tensor, g: Grid) -> dict[str, Tensor]:
    """The same blocks input by input: segment ``(group * cols + input block) * taps + tap``.

    ``t_row`` holds ``tap * rows + block row within the group``, ``t_perm`` which block of the values.
    """
    row = torch.repeat_interleave(crow_indices.diff().long(), output_size=col_indices.numel())
    group, within = row // max(g.rows, 1), row % max(g.rows, 1)
    tap, col = col_indices.long() // max(g.cols, 1), col_indices.long() % max(g.cols, 1)
    segment = (group * g.cols + col) * g.taps + tap
    order = segment.argsort(stable=True)  # rows ascend within a segment because the sort is stable
    counts = torch.bincount(segment, minlength=g.groups * g.cols * g.taps)
    return {
        "t_crow": _offsets(counts),
        "t_row": (tap * g.rows + within)[order].to(torch.int32),
        "t_perm": order.to(torch.int32),
        "t_order": _longest_first(counts.view(g.groups * g.cols, g.taps).sum(1)),
    }


def place(crow_indices: Tensor, col_indices: Tensor, g: Grid) -> Tensor:
    """Where each block lies in :func:`blocks` flattened over its first two axes, int64 ``[nnzb]``."""
    row = torch.repeat_interleave(crow_indices.diff().long(), output_size=col_indices.numel())
    return row * (g.taps * g.cols) + col_indices.long()


def gather(weight: Tensor, crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int], groups: int) -> Tensor:
    """The blocks of a dense weight, ``[nnzb, R, C]``."""
    tiles = blocks(weight, block, groups)
    return tiles.flatten(0, 1)[place(crow_indices, col_indices, grid(weight.shape, block, groups))]


def scatter(values: Tensor, crow_indices: Tensor, col_indices: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """The dense weight of ``shape``, 0 where pruned."""
    g = grid(shape, tuple(values.shape[1:]), groups)
    tiles = values.new_zeros(g.groups * g.rows * g.taps * g.cols, *g.block)
    tiles = tiles.index_put((place(crow_indices, col_indices, g),), values)
    return unblocks(tiles.view(g.groups * g.rows, g.taps * g.cols, *g.block), shape, groups)


def check(
    values: Tensor, index: dict[str, Tensor], shape: torch.Size, shapes: Sequence[tuple[int, int]]
) -> str | None:
    """Why the parts are no block-sparse weight of ``shape`` (kernels read through them unchecked), or None."""
    crow, col, block = index["crow_indices"], index["col_indices"], index["block"]
    if block.dim() != 4 or block.shape[0] != 0 or tuple(block.shape[2:]) not in shapes:
        return f"one of the blocks {shapes} as R, C in the shape [0, groups, R, C] of 'block', got {list(block.shape)}"
    groups, size = block.shape[1], tuple(block.shape[2:])
    if groups < 1 or shape[0] % groups:
        return f"groups that divide {shape[0]} outputs, got {groups}"
    g = grid(shape, size, groups)
    nnzb, places = col.numel(), g.taps * g.cols
    if any(index[name].dtype != torch.int32 for name in ("crow_indices", "col_indices", "row_order", "runs")):
        return "int32 indices, got others"
    if crow.shape != (g.groups * g.rows + 1,) or col.dim() != 1 or values.shape != (nnzb, *size):
        return (
            f"crow_indices [{g.groups * g.rows + 1}], col_indices [blocks] and values [blocks, {size[0]}, {size[1]}], "
            f"got {list(crow.shape)}, {list(col.shape)}, {list(values.shape)}"
        )
    counts = crow.long().diff()  # int32 differences of a torn file can wrap
    if int(crow[0]) != 0 or int(crow[-1]) != nnzb or bool((counts < 0).any()):
        return f"crow_indices that ascend from 0 to {nnzb}, got {int(crow[0])} to {int(crow[-1])}"
    if nnzb and (int(col.min()) < 0 or int(col.max()) >= places):
        return f"col_indices in [0, {places}), got {int(col.min())} to {int(col.max())}"
    if bool((place(crow, col, g).diff() <= 0).any()):
        return "col_indices that ascend within each block row, got others"
    for name, tensor in schedule(crow, size).items():
        if not torch.equal(tensor, index[name]):
            return f"the {name} that follows from crow_indices, got another"
    mask = index.get("mask")
    if mask is not None and (mask.shape != values.shape or mask.dtype != torch.bool):
        return f"a bool mask of shape {list(values.shape)}, got {mask.dtype} {list(mask.shape)}"
    return None


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def _longest_first(counts: Tensor) -> Tensor:
    return counts.argsort(descending=True, stable=True).to(torch.int32)
