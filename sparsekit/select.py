"""Selection: exactly as many weights as asked for, from the layers that are ranked together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import floor
from numbers import Real

import torch
from torch import Tensor

from .mask import Masks
from .pattern import Pattern

__all__ = ["SCOPES", "pools", "select", "shares", "spread"]

SCOPES = ("global", "layer", "er", "erk")


def matches(name: str, pattern: str) -> bool:
    """Whether an fnmatch pattern names a weight or its module."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def pools(scope: str | Sequence[str | Iterable[str]], names: list[str]) -> list[list[str]]:
    """The layers that are ranked together; raises ValueError on an unknown scope or a layer in no group or two.

    ``"global"``; ``"layer"``; ``"er"`` and ``"erk"``, where each layer gets its share by :func:`spread`; or
    groups of fnmatch patterns, ``["conv*", ["fc1", "fc2"]]``.
    """
    if scope == "global":
        return [names]
    if isinstance(scope, str) and scope in SCOPES:
        return [[name] for name in names]
    if isinstance(scope, str) or not isinstance(scope, Sequence) or not scope:
        raise ValueError(f"Expected scope {', '.join(map(repr, SCOPES))} or groups of patterns, got {scope!r}")
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in scope]
    found = [[name for name in names if any(matches(name, p) for p in group)] for group in groups]
    for name in names:
        if (times := sum(name in pool for pool in found)) != 1:
            raise ValueError(f"{name}: Expected a layer in exactly one group of the scope, got it in {times}")
    for group, pool in zip(groups, found, strict=True):
        if not pool:
            raise ValueError(f"Expected groups of layers of this model ({', '.join(names)}), got {list(group)}")
    return found


def shares(given: float | Mapping[str, float], together: list[list[str]], scope: object) -> list[float]:
    """The share to remove from each pool; raises ValueError unless each pool has one, between 0 and 1."""
    names = [name for pool in together for name in pool]
    if isinstance(given, Mapping):
        if scope in ("global", "er", "erk"):
            raise ValueError(f"Expected one share with scope={scope!r}, got one per layer; use scope='layer'")
        table = {}
        for name in names:
            hits = [value for pattern, value in given.items() if matches(name, pattern)]
            if not hits:
                raise ValueError(f"{name}: Expected a share for every layer (add '*'), got {list(given)}")
            table[name] = hits[-1]
        for pattern in given:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(f"Expected shares for layers of this model ({', '.join(names)}), got {pattern!r}")
    else:
        table = dict.fromkeys(names, given)
    for name, share in table.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
            raise ValueError(f"{name}: Expected a share between 0 and 1, got {share!r}")
    for pool in together:
        if len({table[name] for name in pool}) > 1:
            raise ValueError(f"{pool[0]}: Expected one share for all layers of its group, got several")
    return [table[pool[0]] for pool in together]


def spread(scope: str, alive: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    """How many weights each layer keeps, of ``keep`` in all, for Erdős-Rényi densities.

    Densities go as ``(out + in) / (out in)`` for ``"er"`` and ``(out + in + kh + kw) / (out in kh kw)`` for
    ``"erk"`` (RigL, arXiv:1911.11134, section 3), a layer that would exceed what it has keeping all of it.
    Counts are exact: what rounding leaves goes to the largest remainders, ties to earlier layers.
    """
    most = {name: int(mask.sum()) for name, mask in alive.items()}
    weight = {}
    for name, mask in alive.items():
        shape = mask.shape if scope == "erk" else mask.shape[:2]
        weight[name] = sum(shape) / torch.Size(shape).numel() * mask.numel() if mask.numel() else 0.0
    wanted = {name: 0.0 for name in alive}
    free, left = [name for name in alive if most[name]], float(keep)
    while free and left > 0:
        scale = left / sum(weight[name] for name in free)
        full = [name for name in free if scale * weight[name] >= most[name]]
        for name in full or free:
            wanted[name] = float(most[name]) if full else scale * weight[name]
        if not full:
            break
        left -= sum(most[name] for name in full)
        free = [name for name in free if name not in full]
    counts = {name: floor(value) for name, value in wanted.items()}
    rest = keep - sum(counts.values())
    for name in sorted(counts, key=lambda name: counts[name] - wanted[name]):
        if rest > 0 and counts[name] < most[name]:
            counts[name], rest = counts[name] + 1, rest - 1
    return counts


def select(
    pool: list[str],
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    pattern: Pattern,
    remove: int,
    least: int = 0,
) -> Masks:
    """Remove ``remove`` weights from the layers in ``pool``, lowest group mean first.

    Each layer keeps its best groups until they hold at least ``least`` weights, even if less is removed then.
    """
    parts, lives, sizes = [], [], []
    for name in pool:
        total, live = pattern.group_scores(scores[name], alive[name])
        if pattern.name != "channel" and pattern.group == (1, 1):
            size = live.to(total.dtype)
        else:
            size, _ = pattern.group_scores(alive[name].to(total.dtype), alive[name])
        parts.append(total / size.clamp(min=1))
        lives.append(live & ~_best(parts[-1], size, live, least) if least else live)
        sizes.append(size)
    devices = {p.device for p in parts}
    gather = torch.cat if len(devices) == 1 else (lambda ts: torch.cat([t.cpu() for t in ts]))
    rank, free, size = gather(parts), gather(lives), gather(sizes)
    keep = torch.ones_like(free)
    if remove > 0 and bool(free.any()):
        index = free.nonzero().flatten()  # late steps rank the few that are left
        keep[index[_lowest(rank[index], size[index], remove)]] = False
    masks, start = {}, 0
    for name, part in zip(pool, parts, strict=True):
        groups = keep[start : start + part.numel()].to(alive[name].device)
        masks[name] = pattern.expand(groups, alive[name].shape) & alive[name]
        start += part.numel()
    return masks


def _best(rank: Tensor, size: Tensor, live: Tensor, least: int) -> Tensor:
    """The fewest top-ranked groups of a layer that hold ``least`` weights (all of them if it has no more)."""
    order = rank.masked_fill(~live, -torch.inf).argsort(descending=True, stable=True)[: int(live.sum())]
    before = size[order].double().cumsum(0) - size[order]
    best = torch.zeros_like(live)
    best[order[before < least]] = True
    return best


def _lowest(rank: Tensor, size: Tensor, remove: int) -> Tensor:
    """Indices of the lowest-ranked groups whose sizes add up to ``remove``, or as near as they can."""
    if bool((size == 1).all()):
        # A threshold needs no sort of the whole network; ties at it go by index.
        threshold = rank.kthvalue(min(remove, rank.numel())).values
        below, ties = (rank < threshold).nonzero().flatten(), (rank == threshold).nonzero().flatten()
        return torch.cat([below, ties[: remove - below.numel()]])
    order = rank.argsort(stable=True)
    removed = size[order].double().cumsum(0)
    count = int((removed <= remove).sum())
    if count < order.numel():
        under = float(removed[count - 1]) if count else 0.0
        count += float(removed[count]) - remove < remove - under
    return order[:count]
