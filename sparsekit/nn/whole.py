"""The whole model, dense against converted: layers that are fast alone need not be so together.

Caches, layouts and calls between layers are seen by no measurement of one layer. Where the converted model is
slower than the dense one, its layers are made dense again, the one that loses most first; all of them where none is
known to lose. For training the rival keeps pruned weights pruned as well: dense layers that mask their gradients.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import device
from ..plan import ModelPlan, measure, recall, remember
from .base import SparseModule
from .planning import Budget, autocast, fall

__all__ = ["call", "check", "compare"]

_CALLS, _FEW = 17, 8  # of either model, that a comparison takes; the few where one lasts 20 ms
_PASSES = 3
_SECONDS = 0.1  # of either model where one is small: a decision within 1 % or so


def call(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output for a tensor, or a tuple, list or dict of arguments."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def check(
    plain: nn.Module, sparse: nn.Module, example_inputs: Any, training: bool, key: str, budget: Budget, seconds: float
) -> ModelPlan:
    """Time both, in eval mode; make layers of ``sparse`` dense while it is the slower one; what came of it.

    ``key`` names model and input in the cache, ``seconds`` is what one pass is known to take.
    """
    layers = {name: module for name, module in sparse.named_modules() if isinstance(module, SparseModule)}
    plan = ModelPlan(work="forward + backward" if training else "forward")
    key = hashlib.sha256(key.encode()).hexdigest()
    cost = 2 * (_CALLS if seconds < 0.02 else _FEW) * seconds * (3 if training else 1)
    free = {name: module for name, module in layers.items() if not module.plan.forced and module.format.name != "dense"}
    losses: dict[str, float] | None = None
    with _Eval(plain, sparse):
        passes = {"dense": _pass(plain, example_inputs, training), "sparse": _pass(sparse, example_inputs, training)}
        if None in passes.values():
            return replace(plan, note="whole model not timed: it has no output that a gradient could start from")
        fallen: list[str] = []
        while True:
            kept = f"{key}|{sorted((name, module.format.name) for name, module in layers.items())}"
            times = recall(kept)
            if times is None and cost > budget.left:
                left = f"takes about {cost:.1f} s, {max(budget.left, 0):.1f} of plan_seconds are left"
                return replace(plan, note=f"whole model not timed: that {left}", fallen=tuple(fallen))
            times = times or remember(kept, measure(passes, min(_SECONDS, budget.left / 4)))
            us, dense_us = times["sparse"], times["dense"]
            if all(module.format.name == "dense" for module in layers.values()):
                us = dense_us  # the same calls: what differs is noise
            plan = replace(plan, us=us, dense_us=dense_us, fallen=tuple(fallen))
            if us <= dense_us or not free:
                return plan
            if losses is None:
                losses = recall(f"{key}|losses") or remember(f"{key}|losses", _losses(plain, sparse, free, passes))
            worst = max(free, key=lambda name: _loss(losses, name))
            for name in [worst] if _loss(losses, worst) > 0 else [*free]:  # no layer is to blame: all of them
                fall(free.pop(name), f"the whole model took {us / dense_us:.2f}x the time of dense with it")
                fallen.append(name)


def compare(models: Mapping[str, nn.Module], example_inputs: Any, training: bool) -> dict[str, float] | None:
    """Median us of one pass of each model, in turns, in eval mode; None where nothing has a gradient to start from."""
    with _Eval(*models.values()):
        passes = {name: _pass(model, example_inputs, training) for name, model in models.items()}
        return None if None in passes.values() else measure(passes, 0.1)


def _loss(losses: Mapping[str, float], name: str) -> float:
    """Microseconds by which a layer is slower sparse than dense, 0 where that is not known."""
    times = losses.get(f"sparse {name}"), losses.get(f"dense {name}")
    return 0.0 if None in times else times[0] - times[1]


def _losses(plain: nn.Module, sparse: nn.Module, names, passes: Mapping[str, Callable]) -> dict[str, float]:
    """Microseconds that each layer's forward takes inside either model."""
    found: dict[str, list[float]] = {}
    started: dict[str, float] = {}
    for kind, model in (("dense", plain), ("sparse", sparse)):
        handles = []
        present = dict(model.named_modules())  # torch's attention has no layer where ours has one
        for name in filter(present.get, names):

            def begin(module, args, label=f"{kind} {name}"):
                device.settle()
                started[label] = time.perf_counter()

            def end(module, args, output, label=f"{kind} {name}"):
                device.settle()
                found.setdefault(label, []).append((time.perf_counter() - started[label]) * 1e6)

            module = present[name]
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        try:
            for _ in range(_PASSES):
                passes[kind]()
        finally:
            for handle in handles:
                handle.remove()
    return {label: min(times) for label, times in found.items()}


def _pass(model: nn.Module, example_inputs: Any, training: bool) -> Callable[[], object] | None:
    """One forward pass, or forward and backward, as the layers were measured; None where nothing has a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad] if training else []
    tensors = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor)]
    cast = autocast((tensors or [*model.parameters()])[0].device.type)
    if not training:

        def forward():
            with torch.no_grad(), cast():
                return call(model, example_inputs)

        return forward

    # Gradients must reach neither the caller's inputs nor an optimizer that lives in hooks.
    foreign = any(t.requires_grad for t in tensors) or any(p._post_accumulate_grad_hooks for p in parameters)

    def step():
        with torch.enable_grad():
            with cast():
                output = call(model, example_inputs)
            leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            grads = [torch.ones_like(t) for t in leaves]
            if foreign:
                return leaves and torch.autograd.grad(leaves, parameters, grads, allow_unused=True)
            if leaves:
                torch.autograd.backward(leaves, grads)  # as a training step does
        for parameter in parameters:
            parameter.grad = None
        return leaves

    return step if step() else None


class _Eval:
    """Both models in eval mode; random generators, training flags and gradients as before after it."""

    def __init__(self, *models: nn.Module) -> None:
        self._flags = {module: module.training for model in models for module in model.modules()}
        self._grads = [(p, p.grad) for model in models for p in model.parameters() if p.grad is not None]
        self._models, self._fork = models, torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        for model in self._models:
            model.eval()
        for parameter, _ in self._grads:
            parameter.grad = None

    def __exit__(self, *exception) -> None:
        for module, flag in self._flags.items():
            module.training = flag
        for parameter, grad in self._grads:
            parameter.grad = grad
        self._fork.__exit__(*exception)
