"""convert and to_dense: whole models in and out of sparse layers."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .. import device
from .. import format as formats
from ..explanation import formats_of
from ..kernels import tuning
from ..mask import Masks, bias_name, check_masks, density, is_transposed, leaf_name, mask_of, weight_name, weight_of
from ..plan import LayerPlan, ModelPlan
from ..prune import check_model, prunable, why_not
from .attention import (
    SparseMultiheadAttention,
    TransposedLinear,
    block_fast_paths,
    in_projection,
    restore_fast_paths,
)
from .base import SparseModule
from .capture import capture, on_gpu
from .conv import SparseConv1d, SparseConv2d
from .fuse import Applied, Shortened
from .joined import separate
from .linear import SparseLinear
from .order import original, restore_order
from .planning import Budget, Job, fit, plan_layers, thunk
from .pool import Pooled
from .quantized import QuantizedLinear
from .whole import call, check

__all__ = ["convert", "dense_state", "masks_of", "reject_tied", "to_dense"]

_SPARSE = {
    nn.Linear: SparseLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: SparseLinear,  # the output projection of an attention
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
}
_HOOKS = [name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name]


def convert(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example_inputs: Any = None,
    training: bool = False,
    impl: str | Mapping[str, str] = "auto",
    inplace: bool = False,
    *,
    plan_seconds: float = 10.0,
    graph: bool = False,
) -> nn.Module:
    """:func:`sparsekit.convert` in the order of rows that the model has."""
    budget = Budget(plan_seconds)
    if graph and (training or example_inputs is None):
        raise ValueError("Expected graph=True with example_inputs and without training, which it cannot capture")
    if graph:
        on_gpu(model, example_inputs)
    layers = prunable(model)
    impls = _impls(impl, layers)
    if masks is None:
        masks = {name: mask_of(module) for name, module in layers.items()}
    _explain_refused(model, masks, layers)
    check_masks(masks, {name: torch.Size(weight_of(module).shape) for name, module in layers.items()})
    for name in masks:
        if not weight_of(layers[name]).is_floating_point():
            raise TypeError(f"{name}: Expected a floating-point weight, got {weight_of(layers[name]).dtype}")
    masks = {name: mask.detach() for name, mask in masks.items() if not bool(mask.all())}
    for name, mask in masks.items():
        if impls[name] == "auto":
            continue
        folded = _sparse_class(layers[name])._fold(mask)
        if reason := formats.get(impls[name]).unsupported(folded, getattr(layers[name], "groups", 1)):
            raise ValueError(f"{name}: Expected a layer that {impls[name]!r} can hold, got {reason}")
    reject_tied(model, masks)
    if not inplace:
        model = _deepcopy(model)
        layers = prunable(model)
    inputs, seconds = _record_inputs(model, [layers[name] for name in masks], example_inputs, training)
    plain = _rival(model, masks, training) if inputs and "auto" in impls.values() else None
    planned, jobs, swaps = {}, [], {}
    for name, mask in masks.items():
        module, x = layers[name], inputs.pop(id(layers[name]), None)
        path = "" if name == "weight" else name.removesuffix("_weight").removesuffix(".weight")
        layer = in_projection(module) if isinstance(module, nn.MultiheadAttention) else module
        layer = layer.to_dense() if isinstance(layer, SparseModule) else layer
        if impls[name] == "auto":
            jobs.append(Job(path, layer, mask, _sparse_class(layer), x, training))
        else:
            planned[path] = _force(path, layer, mask, x, training, impls[name])
        if not mask.any():
            warnings.warn(f"{name}: no weight survives; the layer outputs its bias", stacklevel=3)
    planned |= plan_layers(jobs, budget)
    for name in masks:
        module, sparse = layers[name], planned["" if name == "weight" else name[: -len(".weight")]]
        sparse.joint = getattr(module, "joint", ".")
        if not isinstance(module, nn.MultiheadAttention):
            _copy_hooks(module, sparse)
        swaps[id(module)] = sparse
    for attention in [m for m in model.modules() if type(m) is nn.MultiheadAttention]:
        parts = swaps.pop(id(attention), None), swaps.pop(id(attention.out_proj), None)
        if parts != (None, None):
            swaps[id(attention)] = whole = SparseMultiheadAttention.from_dense(attention, *parts)
            _copy_hooks(attention, whole)
    model = _swap(model, swaps)
    block_fast_paths(model)
    plan = ModelPlan(work="forward + backward" if training else "forward")
    if plain is not None and jobs:
        key = "|".join([type(plain).__name__, *sorted(f"{job.name} {job.key}" for job in jobs)])
        plan = check(plain, model, example_inputs, training, key, budget, seconds)
        fit(jobs, planned)
    if not training:
        for sparse in planned.values():
            sparse.shed()
    replace(plan, seconds=budget.spent, formats=formats_of(model)).keep(model)
    return capture(model, example_inputs) if graph else model


def _explain_refused(model: nn.Module, masks: Any, layers: Mapping[str, nn.Module]) -> None:
    """A mask for a layer that is there but cannot be pruned gets the reason."""
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if isinstance(masks, Mapping) and name in masks and name not in layers and (reason := why_not(module)):
            raise ValueError(f"{name}: Expected a mask for a layer that can be pruned, got one that is {reason}")


def _impls(impl: str | Mapping[str, str], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The format to force on each weight, or ``"auto"``."""
    impls = dict.fromkeys(layers, "auto" if isinstance(impl, Mapping) else impl)
    for layer, name in impl.items() if isinstance(impl, Mapping) else ():
        spelled = (layer, f"{layer}.weight" if layer else "weight", f"{layer}_weight")
        weight = next((known for known in spelled if known in layers), None)
        if weight is None:
            raise ValueError(f"Expected impl to name prunable layers ({', '.join(layers)}), got {layer!r}")
        impls[weight] = name
    known = ("auto", *formats.names())
    for name in (impl,) if not isinstance(impl, Mapping) else impls.values():
        if name not in known:
            raise ValueError(f"Expected impl 'auto' or a format of {', '.join(known[1:])}, got {name!r}")
    return impls


def to_dense(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Put the original classes and keys back; survivors keep their bits, pruned weights are 0.

    Returns a deep copy unless ``inplace``. The model no longer keeps its pruned weights pruned.
    """
    check_model(model)
    if not inplace:
        model = _deepcopy(model)
    swaps = {}
    for module in model.modules():
        separate(module)
        if isinstance(module, SparseModule | QuantizedLinear):
            dense = module.to_dense()
            _copy_hooks(module, dense)
            swaps[id(module)] = dense
        elif isinstance(module, Applied):
            swaps[id(module)] = module.activation
        elif isinstance(module, Shortened):
            module.__class__ = nn.Sequential
        elif isinstance(module, Pooled):
            swaps[id(module)] = module.original
        elif isinstance(module, SparseMultiheadAttention):
            dense = module.to_dense()
            _copy_hooks(module, dense)
            swaps[id(module)] = dense
    model = _swap(model, swaps)
    restore_fast_paths(model)
    restore_order(model)
    return model


def masks_of(model: nn.Module) -> Masks:
    """The masks of all sparse layers of a converted model, ``{"0.weight": bool tensor}``."""
    check_model(model)
    masks = {
        weight_name(name, module): module.survivors()
        for name, module in model.named_modules()
        if isinstance(module, SparseModule | QuantizedLinear)
    }
    return original(model, masks)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that :func:`to_dense` would give, without building the model; copies."""
    state = {}
    modules = dict(model.named_modules(remove_duplicate=False))  # a module under two names has two sets of keys
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if isinstance(module, QuantizedLinear):
            raise ValueError(f"{owner}: Expected unrounded survivors, got {module.format.name}: save before quantize")
        if isinstance(module, SparseModule) and leaf == "values":
            state[weight_name(owner, module)] = module.weight.detach().clone()
        elif hasattr(module, "joint") and leaf in ("weight", "bias"):
            state[(weight_name if leaf == "weight" else bias_name)(owner, module)] = tensor.detach().clone()
        elif not isinstance(module, SparseModule):
            state[name] = tensor.detach().clone()
    return original(model, state)


def _sparse_class(module: nn.Module) -> type[SparseModule]:
    """The sparse class that takes a dense layer's place, or that a sparse layer has."""
    if isinstance(module, SparseModule):
        return type(module)
    if isinstance(module, nn.MultiheadAttention):
        return SparseLinear
    return TransposedLinear if is_transposed(module) else _SPARSE[type(module)]


def _force(name: str, module: nn.Module, mask: Tensor, x: Tensor | None, training: bool, impl: str) -> SparseModule:
    """A layer in the format that was asked for, whatever it costs."""
    kind = _sparse_class(module)
    if why := formats.get(impl).absent(weight_of(module).device, kind._fold(mask), getattr(module, "groups", 1)):
        warnings.warn(f"{name}: {why}, so {impl!r} runs as a dense product here", stacklevel=4)
    sparse = kind.from_dense(module, mask, impl, name)
    work = "forward + backward" if training else "forward"
    shape, share = tuple(mask.shape), density({name: mask})
    sparse.plan = LayerPlan(name, type(module).__name__, shape, share, chosen=impl, work=work, forced=True)
    if training and (x is None or x.requires_grad):
        sparse.derive()
    if x is not None and x.device.type == "cuda":
        with tuning.on():  # now, not in the first training step
            thunk(sparse, x, training)()
    return sparse


def _rival(model: nn.Module, masks: Mapping[str, Tensor], training: bool) -> nn.Module:
    """The model as torch runs it, over the same tensors; for training, with dense layers that keep the masks."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    plain = to_dense(_deepcopy(model, shared), inplace=True)
    if not training:
        return plain
    with warnings.catch_warnings(action="ignore"):  # the caller is warned of the same masks
        return convert(plain, masks, training=True, impl="dense", inplace=True)


def _record_inputs(
    model: nn.Module, targets: list[nn.Module], example_inputs: Any, training: bool
) -> tuple[dict[int, Tensor], float]:
    """Run the model once: each layer's first input, ``requires_grad`` as in a training step, and the seconds."""
    if example_inputs is None or not targets:
        return {}, 0.0
    seen: dict[int, Tensor] = {}
    alike: dict[tuple, Tensor] = {}  # layers whose inputs are laid out alike share a copy: the time is the same

    def keep(module, args, kwargs):
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        for layer in (module, getattr(module, "out_proj", module)):  # attention calls its output projection by weight
            if x is not None and id(layer) not in seen:
                form = (x.shape, x.stride(), x.dtype, x.device, wanted := training and x.requires_grad)
                if form not in alike:
                    alike[form] = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(wanted)
                seen[id(layer)] = alike[form]

    flags = {module: module.training for module in model.modules()}
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in {*targets, *attentions}]
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no layer
    try:
        model.eval()  # keeps batch-norm statistics as they are
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
            start = time.perf_counter()
            call(model, example_inputs)
            device.settle()
            seconds = time.perf_counter() - start
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)
        for handle in handles:
            handle.remove()
        for module, flag in flags.items():
            module.training = flag
    return seen, seconds


def reject_tied(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """A packed copy of a weight that another layer shares would silently untie the two."""
    owners: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = name.removesuffix("_orig")  # as torch.nn.utils.prune renames it
            full = f"{module_name}.{name}" if module_name else name
            first = owners.setdefault(id(parameter), full)
            if first != full and (tied := next((n for n in (first, full) if n in masks), None)):
                raise ValueError(
                    f"{tied}: Expected a weight of its own, got one shared by {first} and {full}; "
                    "leave it dense by exclude=, or untie them"
                )


def _copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the hooks of ``source`` but those of torch.nn.utils.prune, which recompute its weight."""
    for name in _HOOKS:
        hooks = getattr(source, name)
        foreign = {key: hook for key, hook in hooks.items() if not isinstance(hook, BasePruningMethod)}
        getattr(target, name).update(foreign)
    target._is_full_backward_hook = source._is_full_backward_hook


def _deepcopy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    memo = {} if memo is None else memo
    for module in model.modules():
        leaf = leaf_name(module)
        weight = module.__dict__.get(leaf)
        if f"{leaf}_orig" in module._parameters and isinstance(weight, Tensor):
            # torch.nn.utils.prune leaves a non-leaf here, which cannot be copied; forward makes it anew.
            memo[id(weight)] = weight.detach().clone()
    return copy.deepcopy(model, memo)


def _swap(model: nn.Module, swaps: dict[int, nn.Module]) -> nn.Module:
    if id(model) in swaps:
        return swaps[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in swaps:
                parent._modules[name] = swaps[id(child)]
    return model
