"""Pruning: criterion x scope x pattern -> mask, with exact counts and ties broken by index.

Scores, selection and structure are separate things (as in JaxPruner, arXiv:2304.14082): a criterion
scores every weight, the pattern sums scores over what lives or dies together, and selection removes
exactly the number asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import floor
from numbers import Real

import torch
from torch import Tensor, nn

from .mask import Masks, check_masks, weight_of
from .pattern import Pattern

__all__ = ["CRITERIA", "Layer", "criterion", "prunable", "prune", "prune_step"]


@dataclass(frozen=True)
class Layer:
    """What a criterion sees of one layer: its weight's ``name`` and the dense ``weight`` (detached)."""

    name: str
    weight: Tensor


CRITERIA: dict[str, Callable[[Layer], Tensor]] = {}


def criterion(function: Callable[[Layer], Tensor]) -> Callable[[Layer], Tensor]:
    """Register ``function(layer) -> scores`` (float, of the weight's shape; low scores go first) by its name."""
    CRITERIA[function.__name__] = function
    return function


@criterion
def magnitude(layer: Layer) -> Tensor:
    """|w|, the criterion of iterative magnitude pruning (Frankle & Carbin, arXiv:1803.03635)."""
    return layer.weight.abs()


@criterion
def random(layer: Layer) -> Tensor:
    """Uniform scores from torch's global generator: the random-sparsity control."""
    return torch.rand(layer.weight.shape, device=layer.weight.device)


def prunable(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The layers whose weights can be pruned, as ``{"0.weight": module}`` in model order.

    ``exclude`` holds fnmatch patterns of module or weight names (``"fc3"``, ``"head.*"``); one that
    matches nothing raises ValueError. Plain ``nn.Linear`` and ``nn.Conv2d`` layers (under
    ``torch.nn.utils.prune`` or not) and sparsekit's own count; subclasses and reparametrised layers do
    not, because their forward is unknown. A module reached by two names counts once.
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    found, used = {}, set()
    for name, module in model.named_modules():
        if not _is_prunable(module):
            continue
        weight_name = f"{name}.weight" if name else "weight"
        hits = {p for p in patterns if fnmatchcase(name, p) or fnmatchcase(weight_name, p)}
        used |= hits
        if not hits:
            found[weight_name] = module
    if missing := [p for p in patterns if p not in used]:
        raise ValueError(f"Expected exclude to name prunable layers ({', '.join(found) or 'none'}), got {missing}")
    return found


def _is_prunable(module: nn.Module) -> bool:
    if hasattr(module, "survivors"):
        return True
    if type(module) not in (nn.Linear, nn.Conv2d):
        return False
    return "weight" in module._parameters or {"weight_orig", "weight_mask"} <= {
        *module._parameters,
        *module._buffers,
    }


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.9,
    pattern: str | Pattern = "unstructured",
    criterion: str | Callable[[Layer], Tensor] = "magnitude",
    scope: str = "global",
    exclude: Iterable[str] = (),
) -> Masks:
    """Choose which weights of ``model`` survive; the model itself is not changed.

    Args:
        sparsity: share of weights to remove in [0, 1], counted over all weights in scope, those that
            are already pruned included; exactly ``floor(sparsity * n + 0.5)`` go. With
            ``scope="layer"`` also a dict of fnmatch patterns to shares, later entries winning
            (``{"*": 0.9, "fc3.*": 0.5}``). The N:M pattern fixes the share itself.
        pattern: ``"unstructured"``, ``"block:RxC"``, ``"N:M"`` or ``"channel"``; with groups of more
            than one weight the count is the nearest that whole groups allow.
        criterion: ``"magnitude"``, ``"random"`` or ``function(layer) -> scores``.
        scope: ``"global"`` ranks all layers together, ``"layer"`` each alone.
        exclude: fnmatch patterns of layers to leave dense.

    Returns: ``{"0.weight": bool tensor}``, True where a weight survives. Ties go by layer order, then index.
    Raises: ValueError or TypeError on unknown names, bad shares, non-float or NaN weights.
    """
    layers = prunable(model, exclude)
    alive = {name: _alive(module) for name, module in layers.items()}

    def to_remove(names: list[str], share: float) -> int:
        total = sum(alive[name].numel() for name in names)
        dead = total - sum(int(alive[name].sum()) for name in names)
        return max(0, floor(share * total + 0.5) - dead)

    return _prune(layers, alive, sparsity, pattern, criterion, scope, to_remove)


def prune_step(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    rate: float | Mapping[str, float],
    pattern: str | Pattern = "unstructured",
    criterion: str | Callable[[Layer], Tensor] = "magnitude",
    scope: str = "layer",
    exclude: Iterable[str] = (),
) -> Masks:
    """One round of iterative pruning: remove the share ``rate`` of what ``masks`` left alive.

    Arguments as in :func:`prune`; a weight without an entry in ``masks`` counts as fully alive.
    """
    layers = prunable(model, exclude)
    shapes = {name: weight_of(module).shape for name, module in layers.items()}
    check_masks(masks, shapes)
    alive = {}
    for name, module in layers.items():
        everything = torch.ones(shapes[name], dtype=torch.bool)
        alive[name] = masks.get(name, everything).to(weight_of(module).device)

    def to_remove(names: list[str], share: float) -> int:
        return floor(share * sum(int(alive[name].sum()) for name in names) + 0.5)

    return _prune(layers, alive, rate, pattern, criterion, scope, to_remove)


def _alive(module: nn.Module) -> Tensor:
    """Weights that an earlier pruning removed stay removed; plain zeros are ordinary small weights."""
    if hasattr(module, "survivors"):
        return module.survivors()
    if getattr(module, "weight_mask", None) is not None:
        return module.weight_mask != 0
    return torch.ones(module.weight.shape, dtype=torch.bool, device=module.weight.device)


@torch.no_grad()
def _prune(layers, alive, shares, pattern, criterion, scope, to_remove) -> Masks:
    if not layers:
        raise ValueError("Expected a model with layers to prune (nn.Linear, nn.Conv2d), got none that is not excluded")
    pattern = Pattern.parse(pattern)
    if scope not in ("global", "layer"):
        raise ValueError(f"Expected scope 'global' or 'layer', got {scope!r}")
    rates = _shares(shares, list(layers), scope)
    score = criterion if callable(criterion) else CRITERIA.get(criterion)
    if score is None:
        raise ValueError(f"Expected a criterion of {', '.join(CRITERIA)} or a function, got {criterion!r}")
    scores = {name: _scores(score, name, module) for name, module in layers.items()}

    masks: Masks = {}
    if pattern.nm:
        masks = {name: pattern.nm_mask(scores[name], alive[name]) for name in layers}
    else:
        pools = [list(layers)] if scope == "global" else [[name] for name in layers]
        for pool in pools:
            if pool:
                masks.update(_select(pool, scores, alive, pattern, to_remove(pool, rates[pool[0]])))
    for name, mask in masks.items():
        if not mask.any():
            warnings.warn(f"{name}: no weight survives; the layer will output its bias", stacklevel=4)
    return masks


def _shares(shares: float | Mapping[str, float], names: list[str], scope: str) -> dict[str, float]:
    if isinstance(shares, Mapping):
        if scope != "layer":
            raise ValueError("Expected one share with scope='global', got one per layer; use scope='layer'")
        table = {}
        for name in names:
            hits = [v for p, v in shares.items() if fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[0], p)]
            if not hits:
                raise ValueError(f"{name}: Expected a share for every layer (add '*'), got {list(shares)}")
            table[name] = hits[-1]
        for p in shares:
            if not any(fnmatchcase(n, p) or fnmatchcase(n.rpartition(".")[0], p) for n in names):
                raise ValueError(f"Expected shares for layers of this model ({', '.join(names)}), got {p!r}")
    else:
        table = dict.fromkeys(names, shares)
    for name, share in table.items():
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
            raise ValueError(f"{name}: Expected a share between 0 and 1, got {share!r}")
    return table


def _scores(score: Callable[[Layer], Tensor], name: str, module: nn.Module) -> Tensor:
    weight = weight_of(module).detach()
    if not weight.is_floating_point():
        raise TypeError(f"{name}: Expected a floating-point weight, got {weight.dtype}")
    result = score(Layer(name, weight))
    got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if got != list(weight.shape):
        raise ValueError(f"{name}: Expected scores of shape {list(weight.shape)}, got {got}")
    if result.dtype in (torch.float16, torch.bfloat16):
        result = result.float()  # sums over a block would round
    if result.isnan().any():
        raise ValueError(f"{name}: Expected scores without NaN, got NaN")
    return result


def _select(pool: list[str], scores: dict, alive: dict, pattern: Pattern, remove: int) -> Masks:
    """Remove ``remove`` weights from the layers in ``pool``, lowest group mean first."""
    parts, lives, sizes = [], [], []
    for name in pool:
        total, live = pattern.group_scores(scores[name], alive[name])
        if pattern.name != "channel" and pattern.group == (1, 1):
            size = live.to(total.dtype)
        else:
            size, _ = pattern.group_scores(alive[name].to(total.dtype), alive[name])
        parts.append(total / size.clamp(min=1))
        lives.append(live)
        sizes.append(size)
    devices = {p.device for p in parts}
    gather = torch.cat if len(devices) == 1 else (lambda ts: torch.cat([t.cpu() for t in ts]))
    rank, live, size = gather(parts), gather(lives), gather(sizes)
    keep = live.clone()
    if remove > 0:
        rank = rank.masked_fill(~live, torch.inf)
        keep[_lowest(rank, size, live, remove)] = False
    masks, start = {}, 0
    for name, part in zip(pool, parts, strict=True):
        groups = keep[start : start + part.numel()].to(alive[name].device)
        masks[name] = pattern.expand(groups, alive[name].shape) & alive[name]
        start += part.numel()
    return masks


def _lowest(rank: Tensor, size: Tensor, live: Tensor, remove: int) -> Tensor:
    """Indices of the lowest-ranked groups whose sizes add up to ``remove``, or as near as they can."""
    if bool((size[live] == 1).all()):
        # A threshold needs no sort of the whole network; ties at it go by index.
        threshold = rank.kthvalue(min(remove, int(live.sum()))).values
        below, ties = (rank < threshold).nonzero().flatten(), ((rank == threshold) & live).nonzero().flatten()
        return torch.cat([below, ties[: remove - below.numel()]])
    order = rank.argsort(stable=True)[: int(live.sum())]
    removed = size[order].double().cumsum(0)
    count = int((removed <= remove).sum())
    if count < order.numel():
        under = float(removed[count - 1]) if count else 0.0
        count += float(removed[count]) - remove < remove - under
    return order[:count]
