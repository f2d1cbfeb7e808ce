"""Pruning: criterion x scope x pattern -> mask, with exact counts and ties broken by index.

Scores, selection and structure are separate things (as in JaxPruner, arXiv:2304.14082): a criterion
scores every weight (``criteria``), the pattern sums scores over what lives or dies together, and selection
removes exactly the number asked for (``select``), at once or in steps that score anew what is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import CRITERIA, Facts, Layer, criterion, find
from .mask import Masks, check_masks, is_transposed, leaf_name, pruned_by_torch, weight_name, weight_of
from .pattern import Pattern
from .select import pools, select, shares, spread

__all__ = [
    "CRITERIA", "Layer", "check_counts", "check_model", "criterion", "prunable", "prune", "prune_step", "refill",
    "why_not",
]  # fmt: skip

Scope = str | Sequence[str | Iterable[str]]


def check_model(model: object) -> None:
    """Raises TypeError for what is no module: a state dict, or a class that nobody called."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"Expected a model (a torch.nn.Module), got {got}")


def prunable(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The layers whose weights can be pruned, as ``{"0.weight": module}`` in model order.

    ``exclude`` holds fnmatch patterns of module or weight names (``"fc3"``, ``"head.*"``); one that
    matches nothing raises ValueError. Plain ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` layers (under
    ``torch.nn.utils.prune`` or not), GPT-2's ``Conv1D``, both projections of ``nn.MultiheadAttention`` (that of the
    output alone where it is :func:`crossing`) and sparsekit's own count; subclasses and reparametrised layers do
    not, because their forward is unknown (:func:`why_not`). A module reached by two names counts once.
    """
    check_model(model)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    cross = crossing(model)
    found, used, left = {}, set(), {attention.in_proj for attention in cross if hasattr(attention, "in_proj")}
    for name, module in model.named_modules():
        if module in left or why_not(module) is not None:
            left |= set(module.modules()) if isinstance(module, nn.MultiheadAttention) else set()
            continue
        own = {weight_name(name, module): module}
        if isinstance(module, nn.MultiheadAttention):
            own[f"{name}.out_proj.weight" if name else "out_proj.weight"] = module.out_proj
            left.add(module.out_proj)
            if module in cross:
                del own[weight_name(name, module)]
        for weight, layer in own.items():
            hits = {p for p in patterns if fnmatchcase(weight.rpartition(".")[0], p) or fnmatchcase(weight, p)}
            used |= hits
            if not hits:
                found[weight] = layer
    if missing := [p for p in patterns if p not in used]:
        raise ValueError(f"Expected exclude to name prunable layers ({', '.join(found) or 'none'}), got {missing}")
    return found


def crossing(model: nn.Module) -> set[nn.Module]:
    """The attentions of decoders to what was encoded: their queries have another input than keys and values.

    One packed product would compute rows that nobody needs, so the projection of all three stays dense.
    """
    return {module.multihead_attn for module in model.modules() if isinstance(module, nn.TransformerDecoderLayer)}


_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _has_weight(module: nn.Module) -> bool:
    leaf = leaf_name(module)
    return module._parameters.get(leaf) is not None or pruned_by_torch(module) is not None


def why_not(module: nn.Module) -> str | None:
    """Why the weight of a module cannot be pruned, ``""`` when it has none to prune, None when it can."""
    if hasattr(module, "survivors"):
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized; torch.nn.utils.parametrize.remove_parametrizations folds its weight"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "lazy; the first batch makes its weight"
    if isinstance(module, nn.MultiheadAttention):
        if type(module) is not nn.MultiheadAttention or not _has_weight(module):
            return "not a plain torch attention over one width"
        return "bias_k, bias_v or add_zero_attn" if module.bias_k is not None or module.add_zero_attn else None
    if isinstance(module, nn.Conv3d):
        return "no sparse kernel for convolutions in three dimensions"
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return ""  # the output projection of an attention, which answers for it
    if type(module) not in _PLAIN and not is_transposed(module):
        return "not a plain torch layer" if isinstance(module, _PLAIN) else ""
    if _has_weight(module):
        return None
    if "weight_g" in module._parameters:
        return "under weight_norm; torch.nn.utils.remove_weight_norm folds it"
    return "its weight is not a parameter"


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.9,
    pattern: str | Pattern = "unstructured",
    criterion: str | Callable[[Layer], Tensor] = "magnitude",
    scope: Scope | None = None,
    exclude: Iterable[str] = (),
    *,
    steps: int | None = None,
    least: int = 0,
    init: nn.Module | Mapping[str, Tensor] | None = None,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Masks:
    """Choose which weights of ``model`` survive; the model itself is not changed.

    Args:
        sparsity: share of weights to remove in [0, 1], counted over all weights in scope, those that
            are already pruned included; exactly ``floor(sparsity * n + 0.5)`` go. With
            ``scope="layer"`` or groups also a dict of fnmatch patterns to shares, later entries winning
            (``{"*": 0.9, "fc3.*": 0.5}``). The N:M pattern fixes the share itself.
        pattern: ``"unstructured"``, ``"block:RxC"``, ``"N:M"`` or ``"channel"``; with groups of more
            than one weight the count is the nearest that whole groups allow.
        criterion: a name in :data:`CRITERIA` (``"magnitude"``, ``"random"``, ``"snip"``, ``"synflow"``,
            ``"lamp"``, …) or ``function(layer) -> scores``, see :class:`Layer` for what it may read.
        scope: ``"global"`` ranks all layers together, ``"layer"`` each alone; ``"er"`` and ``"erk"`` rank each
            alone at Erdős-Rényi densities; ``["conv*", "fc*"]`` ranks groups. None: ``"global"`` for single
            weights, ``"layer"`` for structures, whose global ranking empties late layers.
        exclude: fnmatch patterns of layers to leave dense.
        steps: prune in as many steps, survivors going down geometrically, each scored under the mask of the
            one before; None takes what the criterion was registered with (100 for SynFlow, else 1).
        least: how many weights every layer keeps at least, even if less is removed then: 1 guards against
            layer collapse.
        init: model or state dict at initialisation, for criteria that read ``layer.init``.
        data, loss: a batch ``(x, y)`` or an iterable of them, and ``loss(output, y)`` (default:
            cross-entropy), for criteria that read gradients, flow or activations.

    Returns: ``{"0.weight": bool tensor}``, True where a weight survives. Ties go by layer order, then index.
    Raises: ValueError or TypeError on unknown names, bad shares, non-float or NaN weights, or what a
    criterion needs and was not given.
    """
    layers = prunable(model, exclude)
    alive = {name: _alive(module) for name, module in layers.items()}

    def to_keep(names: list[str], share: float) -> int:
        total = sum(alive[name].numel() for name in names)
        return min(_count(alive, names), total - floor(share * total + 0.5))

    facts = Facts(model, layers, init, data, loss)
    return _prune(layers, alive, sparsity, pattern, criterion, scope, to_keep, steps, least, facts)


def prune_step(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    rate: float | Mapping[str, float],
    pattern: str | Pattern = "unstructured",
    criterion: str | Callable[[Layer], Tensor] = "magnitude",
    scope: Scope | None = "layer",
    exclude: Iterable[str] = (),
    *,
    steps: int | None = None,
    least: int = 0,
    init: nn.Module | Mapping[str, Tensor] | None = None,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
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

    def to_keep(names: list[str], share: float) -> int:
        count = _count(alive, names)
        return count - floor(share * count + 0.5)

    facts = Facts(model, layers, init, data, loss)
    return _prune(layers, alive, rate, pattern, criterion, scope, to_keep, steps, least, facts)


@torch.no_grad()
def refill(model: nn.Module, masks: Mapping[str, Tensor], pattern: str | Pattern) -> Masks:
    """Structured masks as dense as ``masks`` in every layer, of the groups with most surviving magnitude.

    Pruned weights inside a group that stays come back, which is why this is no step of pruning (refilling of
    Chen et al., arXiv:2202.04736). Not for N:M, which fixes the density itself.
    """
    pattern = Pattern.parse(pattern)
    if pattern.nm:
        raise ValueError(f"Expected a pattern of groups to refill, got {str(pattern)!r}")
    layers = prunable(model)
    check_masks(masks, {name: weight_of(module).shape for name, module in layers.items()})
    found: Masks = {}
    for name, mask in masks.items():
        scores = weight_of(layers[name]).detach().abs().float() * mask
        everything, remove = torch.ones_like(mask), mask.numel() - int(mask.sum())
        found |= select([name], {name: scores}, {name: everything}, pattern, remove)
    return found


def _alive(module: nn.Module) -> Tensor:
    """Weights that an earlier pruning removed stay removed; plain zeros are ordinary small weights."""
    if hasattr(module, "survivors"):
        return module.survivors()
    if (mask := pruned_by_torch(module)) is not None:
        return mask
    weight = weight_of(module)
    return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)


def check_counts(steps: object, least: object) -> None:
    """Raises ValueError unless both are whole numbers that :func:`prune` takes; ``steps`` may be None."""
    for name, value, smallest in (("steps", 1 if steps is None else steps, 1), ("least", least, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"Expected {name} as a whole number of at least {smallest}, got {value!r}")


def _count(alive: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return sum(int(alive[name].sum()) for name in names)


@torch.no_grad()
def _prune(layers, alive, given, pattern, criterion, scope, to_keep, steps, least, facts: Facts) -> Masks:
    if not layers:
        raise ValueError("Expected a model with layers to prune (nn.Linear, nn.Conv2d), got none that is not excluded")
    pattern = Pattern.parse(pattern)
    if scope is None:
        scope = "global" if pattern.name == "unstructured" else "layer"
    together = pools(scope, list(layers))
    rates = shares(given, together, scope)
    score = find(criterion)
    steps = getattr(score, "steps", 1) if steps is None else steps
    check_counts(steps, least)
    transposed = {name for name, module in layers.items() if is_transposed(module)}

    def turned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as patterns mean them, [out, in], and back."""
        return {name: t.t().contiguous() if name in transposed else t for name, t in tensors.items()}

    if scope in ("er", "erk"):
        counts = spread(scope, alive, to_keep(list(layers), rates[0]))
        goals = [counts[pool[0]] for pool in together]
    else:
        goals = [to_keep(pool, rate) for pool, rate in zip(together, rates, strict=True)]
    first = [_count(alive, pool) for pool in together]
    masks: Masks = dict(alive)
    for step in range(1, (1 if pattern.nm else steps) + 1):
        facts.under(masks)
        scores = turned({name: _scores(score, name, module, masks[name], facts) for name, module in layers.items()})
        if pattern.nm:
            alive = turned(alive)
            masks = turned({name: pattern.nm_mask(scores[name], alive[name]) for name in layers})
            break
        after: Masks = {}
        masks = turned(masks)
        for pool, begin, goal in zip(together, first, goals, strict=True):
            keep = _between(begin, goal, step / steps)
            after.update(select(pool, scores, masks, pattern, _count(masks, pool) - keep, least))
        masks = turned(after)
    for name, mask in masks.items():
        if not mask.any():
            warnings.warn(f"{name}: no weight survives; the layer will output its bias", stacklevel=4)
    return masks


def _between(first: int, last: int, part: float) -> int:
    """Survivors after a ``part`` of the way from ``first`` to ``last``, geometrically (arXiv:2006.05467)."""
    if part == 1 or first == 0:
        return last
    return max(last, floor(first * (max(last, 1) / first) ** part + 0.5))


def _scores(score: Callable[[Layer], Tensor], name: str, module: nn.Module, alive: Tensor, facts: Facts) -> Tensor:
    weight = weight_of(module).detach()
    if not weight.is_floating_point():
        raise TypeError(f"{name}: Expected a floating-point weight, got {weight.dtype}")
    result = score(Layer(name, weight, alive, facts))
    got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if got != list(weight.shape):
        raise ValueError(f"{name}: Expected scores of shape {list(weight.shape)}, got {got}")
    if result.dtype in (torch.float16, torch.bfloat16):
        result = result.float()  # sums over a block would round
    if result.isnan().any():
        raise ValueError(f"{name}: Expected scores without NaN, got NaN")
    return result
