"""Masks as few bytes: one bit per group that lives or dies together, or the positions of the living ones.

Positions are coded by Elias and Fano (P. Elias, *Efficient storage and retrieval by content and address of
static files*, J. ACM 1974; R. Fano, MIT 1971): the low bits of each as they are, the high bits as gaps in unary,
``2 + log2(groups / living)`` bits for each living group. That is the smaller below a density of about 1/4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mask import pack_bits, unpack_bits
from .pattern import Pattern

__all__ = ["decode", "encode", "structure"]


def encode(mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """A bool mask as uint8 ``[bytes]`` on the CPU and the JSON facts that :func:`decode` needs beside its shape.

    The facts: ``pattern`` as :func:`structure` names it, ``coding`` ``"bitmap"`` or ``"elias-fano"``, whichever
    is smaller, and ``count``, the number of living groups.
    """
    mask = mask.detach().cpu()
    pattern = structure(mask)
    alive = _groups(mask, pattern)
    where = alive.nonzero().flatten().numpy()
    coded = _positions(where, alive.numel())
    small = len(coded) < -(-alive.numel() // 8)
    facts = {"pattern": pattern.name, "coding": "elias-fano" if small else "bitmap", "count": len(where)}
    return torch.from_numpy(coded) if small else pack_bits(alive), facts


def decode(coded: Tensor, shape: list[int], facts: dict[str, Any]) -> Tensor:
    """The inverse of :func:`encode`; raises ValueError, before it allocates, on facts or bytes that do not fit."""
    pattern, coding, count = Pattern.parse(facts.get("pattern")), facts.get("coding"), facts.get("count")
    groups = _count(shape, pattern)
    if type(count) is not int or not 0 <= count <= groups:
        raise ValueError(f"Expected a count of at most {groups} groups, got {count!r}")
    if coded.dtype != torch.uint8 or coded.dim() != 1:
        raise ValueError(f"Expected mask bytes in one row of uint8, got {list(coded.shape)} of {coded.dtype}")
    if coding == "bitmap":
        alive = unpack_bits(coded, [groups])
    elif coding == "elias-fano":
        alive = torch.zeros(groups, dtype=torch.bool)
        alive[torch.from_numpy(_from_positions(coded.numpy(), count, groups))] = True
    else:
        raise ValueError(f"Expected a mask coded as bitmap or elias-fano, got {coding!r}")
    if int(alive.sum()) != count:
        raise ValueError(f"Expected {count} living groups, got {int(alive.sum())}")
    return alive.view(shape) if _flat(pattern) else pattern.expand(alive, torch.Size(shape))


def structure(mask: Tensor) -> Pattern:
    """The coarsest pattern that a mask obeys: channel, the largest block, 2:4 where about half lives, or none."""
    if mask.dim() < 2 or not mask.numel():
        return Pattern.parse("unstructured")
    view = mask.reshape(mask.shape[0], mask.shape[1], -1).numpy(force=True)
    if (view == view[:, :1, :1]).all():
        return Pattern.parse("channel")
    rows = _stride(view.reshape(len(view), -1))
    cols = _stride(view[::rows].swapaxes(0, 1).reshape(view.shape[1], -1))
    if (rows, cols) != (1, 1):
        return Pattern.parse(f"block:{rows}x{cols}")
    half = Pattern.parse("2:4")
    return half if view.mean() > 0.4 and half.holds(mask) else Pattern.parse("unstructured")


def _stride(view: np.ndarray) -> int:
    """The largest s such that rows of ``view`` differ from the one before only at multiples of s."""
    changes = np.flatnonzero((view[1:] != view[:-1]).any(1)) + 1
    return int(np.gcd.reduce(changes)) if len(changes) else len(view)


def _flat(pattern: Pattern) -> bool:
    return pattern.name != "channel" and pattern.group == (1, 1)


def _groups(mask: Tensor, pattern: Pattern) -> Tensor:
    """bool ``[groups]``: row-major where each weight is its own group, else in the order of ``Pattern.expand``."""
    return mask.flatten() if _flat(pattern) else pattern.group_scores(mask.float(), mask)[1]


def _count(shape: list[int], pattern: Pattern) -> int:
    numel = 1
    for extent in shape:
        numel *= extent
    if _flat(pattern):
        return numel
    if len(shape) < 2 or not numel:
        raise ValueError(f"Expected a mask of two axes or more under {pattern}, got {shape}")
    if pattern.name == "channel":
        return shape[0]
    rows, cols = pattern.group
    if rows > shape[0] or cols > shape[1]:
        raise ValueError(f"Expected blocks inside a weight of shape {shape}, got {pattern}")
    return -(-shape[0] // rows) * -(-shape[1] // cols) * (numel // (shape[0] * shape[1]))


def _split(count: int, size: int) -> tuple[int, int]:
    """Low bits of each position, and bits in all of the high parts, for ``count`` positions below ``size``."""
    low = (size // count).bit_length() - 1
    return low, count + ((size - 1) >> low)


def _positions(where: np.ndarray, size: int) -> np.ndarray:
    count = len(where)
    if not count:
        return np.zeros(0, np.uint8)
    low, length = _split(count, size)
    lows = np.empty((count, low), np.uint8)
    for bit in range(low):
        lows[:, bit] = (where >> bit) & 1
    highs = np.zeros(length, np.uint8)
    highs[(where >> low) + np.arange(count)] = 1
    return np.concatenate([np.packbits(part.reshape(-1), bitorder="little") for part in (lows, highs)])


def _from_positions(coded: np.ndarray, count: int, size: int) -> np.ndarray:
    low, length = _split(count, size) if count else (0, 0)
    cut = -(-count * low // 8)
    if len(coded) != cut + -(-length // 8):
        raise ValueError(f"Expected {cut + -(-length // 8)} mask bytes for {count} of {size}, got {len(coded)}")
    if not count:
        return np.zeros(0, np.int64)
    lows = np.unpackbits(coded[:cut], count=count * low, bitorder="little").reshape(count, low)
    highs = np.flatnonzero(np.unpackbits(coded[cut:], count=length, bitorder="little"))
    if len(highs) != count:
        raise ValueError(f"Expected {count} positions, got {len(highs)}")
    where = (highs - np.arange(count)) << low
    for bit in range(low):
        where |= lows[:, bit].astype(np.int64) << bit
    if where[-1] >= size or (where[1:] <= where[:-1]).any():
        raise ValueError(f"Expected ascending positions below {size}, got others")
    return where
