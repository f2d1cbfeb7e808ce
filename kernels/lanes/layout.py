"""Weights in lanes: masks to steps and back.

A weight, viewed as ``[out, in * kernel]``, is cut into groups of 64 rows, which stand in the lanes of four vectors of
16. In every step of a group each row takes at most one of its survivors, its next one, if that lies in the step's
window of 64 inputs. A window begins at a multiple of 16 as far right as no survivor is left behind; rows that run
ahead wait at its end. At density 0.1 seven slots of ten are used, at 0.02 four of ten.

Of step s, lane l (row ``64 g + l`` of the order): ``values[s, l]``, 0 where there is no survivor, and one byte in
``codes[s, l % 16 * 4 + l // 16]`` (so that one 32-bit lane of a vector holds those of four rows): 0 for none,
otherwise the input's place in its half of the window, plus 128 in the first half, 64 in the second.
``bases[s]`` is where the window begins, ``starts[g]`` a group's first step. ``order`` names the rows lane by lane,
longest first, where that saves steps, otherwise it is empty.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROWS, WINDOW, STRIDE = 64, 64, 16
FIRST, SECOND = 0x80, 0x40
_WORTH = 0.95  # of the steps, that another order of rows may need: writing results in it costs about as much
_NONE = np.iinfo(np.int64).max


def index(mask: Tensor) -> dict[str, Tensor]:
    """``codes``, ``bases``, ``starts`` and ``order`` of a bool mask."""
    flat = mask.flatten(1).cpu().numpy()
    order, steps = _schedule(flat)
    group, base, place = steps
    codes = np.where(place < 0, 0, np.where(place < 32, FIRST | place, SECOND | (place - 32))).astype(np.uint8)
    codes = np.ascontiguousarray(codes.reshape(-1, 4, 16).transpose(0, 2, 1)).reshape(-1, ROWS)
    starts = np.searchsorted(group, np.arange(_groups(flat.shape[0]) + 1))
    found = {"codes": codes, "bases": base.astype(np.int32), "starts": starts.astype(np.int32), "order": order}
    return {name: torch.from_numpy(array).to(mask.device) for name, array in found.items()}


def slots(mask: Tensor) -> int:
    """How many values the layout holds for a mask, those of empty slots included."""
    return len(_schedule(mask.flatten(1).cpu().numpy())[1][0]) * ROWS


def _groups(rows: int) -> int:
    return -(-rows // ROWS)


def _schedule(mask: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The order of rows (int32, empty for their own) and the steps: group, base, place of each lane (-1: none)."""
    counts = mask.sum(1)
    columns = mask.nonzero()[1]
    plain = _steps(np.arange(len(mask)), counts, columns, mask.shape[1])
    order = np.argsort(-counts, kind="stable")
    sorted_ = _steps(order, counts, columns, mask.shape[1])
    if len(sorted_[0]) < _WORTH * len(plain[0]):
        return order.astype(np.int32), sorted_
    return np.empty(0, np.int32), plain


def _steps(order: np.ndarray, counts: np.ndarray, columns: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
    groups, limit = _groups(len(order)), max(0, width - WINDOW)
    ends = np.zeros(groups * ROWS, np.int64)
    at = ends.copy()
    ends[: len(order)] = counts.cumsum()[order]
    at[: len(order)] = ends[: len(order)] - counts[order]
    at, ends = at.reshape(-1, ROWS), ends.reshape(-1, ROWS)
    columns = np.append(columns, _NONE)
    group, found = np.arange(groups), []
    while len(group):
        following = np.where(at < ends, columns[np.minimum(at, len(columns) - 1)], _NONE)
        base = following.min(1)
        left = base < _NONE
        if not left.all():
            group, at, ends, following, base = (part[left] for part in (group, at, ends, following, base))
        base = np.minimum(base // STRIDE * STRIDE, limit)
        place = following - base[:, None]
        taken = place < WINDOW
        found.append((group, base, np.where(taken, place, -1).astype(np.int16)))
        at = at + taken
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, ROWS), np.int16)
    group, base, place = (np.concatenate(part) for part in zip(*found, strict=True))
    by_group = group.argsort(kind="stable")
    return group[by_group], base[by_group], place[by_group]


def places(codes: Tensor, bases: Tensor, starts: Tensor, order: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """For every slot ``[steps, 64]`` where its value lies in the flat weight (behind its end for none), and whether it
    has one."""
    size, columns = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    code = codes.view(len(codes), 16, 4).transpose(1, 2).reshape(len(codes), ROWS).int()
    present = code > 0
    column = bases[:, None] + (code & 31) + torch.where(code & SECOND > 0, 32, 0)
    group = torch.repeat_interleave(starts.diff().long(), output_size=len(bases))
    row = group[:, None] * ROWS + torch.arange(ROWS, device=codes.device)
    if order.numel():
        row = order.long()[row.clamp(max=order.numel() - 1)]
    return torch.where(present, row * columns + column, size), present


def gather(weight: Tensor, place: Tensor) -> Tensor:
    """The survivors of a dense weight in their slots, 0 in the others."""
    return torch.cat([weight.flatten(), weight.new_zeros(1)])[place]


def scatter(values: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    """The dense weight of ``shape``, 0 where pruned."""
    size = torch.Size(shape).numel()
    return values.new_zeros(size + 1).scatter(0, place.flatten(), values.flatten())[:size].view(shape)


def check(values: Tensor, index: dict[str, Tensor], shape: torch.Size) -> str | None:
    """Why the parts are no weight of ``shape`` in lanes (kernels read through them unchecked), or None."""
    codes, bases, starts, order = (index[name] for name in ("codes", "bases", "starts", "order"))
    rows, columns, steps = shape[0], int(torch.Size(shape[1:]).numel()), bases.numel()
    kinds = [t.dtype for t in (codes, bases, starts, order)]
    if kinds != [torch.uint8, torch.int32, torch.int32, torch.int32]:
        return f"uint8 codes and int32 bases, starts and order, got {kinds}"
    if bases.dim() != 1 or codes.shape != (steps, ROWS) or values.shape != (steps, ROWS):
        return f"codes and values [{steps}, {ROWS}], as many as bases, got {list(codes.shape)}, {list(values.shape)}"
    if starts.shape != (_groups(rows) + 1,) or order.shape not in ((0,), (rows,)):
        want = f"starts [{_groups(rows) + 1}] and order [0] or [{rows}]"
        return f"{want}, got {list(starts.shape)}, {list(order.shape)}"
    if int(starts[0]) != 0 or int(starts[-1]) != steps or bool((starts.long().diff() < 0).any()):
        return f"starts that ascend from 0 to {steps}, got others"
    if steps and not 0 <= int(bases.min()) <= int(bases.max()) <= max(0, columns - WINDOW):
        return f"windows within {columns} inputs, got bases {int(bases.min())} to {int(bases.max())}"
    if order.numel() and not torch.equal(order.sort().values.long(), torch.arange(rows, device=order.device)):
        return f"an order of {rows} rows, got another"
    if bool(((codes >= SECOND) != (codes > 0)).any()) or bool((codes >= FIRST + 32).any()):
        return "codes of places in a window, got others"
    if bool(((codes >= SECOND + 32) & (codes < FIRST)).any()):
        return "codes of places in a window, got others"
    place, present = places(codes, bases, starts, order, shape)
    again = index_of(place, present, shape)
    if again is None:
        return "every survivor once, inside the weight, got others"
    if bool((values.masked_fill(present, 0) != 0).any()):
        return "0 in slots without a survivor, got others"
    for name, tensor in again.items():
        if not torch.equal(tensor, index[name]):
            return f"{name} that follow from the survivors, got others"
    return None


def index_of(place: Tensor, present: Tensor, shape: torch.Size) -> dict[str, Tensor] | None:
    """The index of the survivors that slots name; None where they name one twice or none of ``shape``."""
    where = place[present]
    size = torch.Size(shape).numel()
    if where.numel() and (int(where.max()) >= size or int(where.bincount().max()) > 1):
        return None
    mask = torch.zeros(size, dtype=torch.bool, device=place.device)
    mask[where] = True
    return index(mask.view(shape))
