"""What criteria may ask about a network: gradients, curvature, flow and activations, each computed once a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ..mask import is_transposed

__all__ = ["Facts", "batches_of", "call"]


class Facts:
    """Answers about the prunable weights ``names`` of ``model`` under a mask; the model itself is never touched.

    ``init`` is a module or state dict with the weights at initialisation, ``data`` one batch ``(x, y)`` or an
    iterable of them, ``loss(output, y)`` a mean over the batch (default: cross-entropy). Losses run in the
    mode, train or eval, that the model is in, so batch norms see what they see there.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        init: nn.Module | Mapping[str, Tensor] | None = None,
        data: Any = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self._model, self._names = model, list(names)
        self._init = init.state_dict() if isinstance(init, nn.Module) else init
        self._batches = None if data is None else batches_of(data)
        if loss is not None and not callable(loss):
            raise TypeError(f"Expected loss as a function of (output, y), got {type(loss).__name__}")
        self._loss = F.cross_entropy if loss is None else loss
        self._twin: nn.Module | None = None
        self._weights: dict[str, Tensor] = {}
        self._alive: Mapping[str, Tensor] = {}
        self._known: dict[str, dict[str, Tensor]] = {}

    def under(self, alive: Mapping[str, Tensor]) -> None:
        """Answer from now on for the network that keeps ``alive`` only."""
        self._alive, self._known = alive, {}

    def init(self, name: str, weight: Tensor) -> Tensor:
        """The weight at initialisation."""
        if self._init is None:
            raise ValueError(f"{name}: Expected init=, the model or state dict at initialisation, for this criterion")
        first = self._init.get(name, self._init.get(f"{name}_orig"))
        if first is None or first.shape != weight.shape:
            got = "none" if first is None else list(first.shape)
            raise ValueError(f"{name}: Expected an initial weight of shape {list(weight.shape)}, got {got}")
        return first.detach().to(weight.device, weight.dtype)

    def gradient(self, name: str) -> Tensor:
        """d loss / d weight."""
        return self._once("gradient", self._gradients)[name]

    def hessian_gradient(self, name: str) -> Tensor:
        """Hessian times gradient."""
        return self._once("hessian_gradient", self._hessian_gradients)[name]

    def flow(self, name: str) -> Tensor:
        """d R / d |weight|."""
        return self._once("flow", self._flows)[name]

    def input_rms(self, name: str, weight: Tensor) -> Tensor:
        """Root mean square per input, broadcast to ``weight``."""
        rms = self._once("input_rms", self._input_rms)[name]
        if is_transposed(_module(self._model, name)):
            return rms.view(-1, 1).expand_as(weight)
        groups = rms.numel() // weight.shape[1]
        rows = rms.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
        return rows.view(*weight.shape[:2], *[1] * (weight.dim() - 2)).expand_as(weight)

    @torch.enable_grad()
    def _once(self, what: str, compute: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
        if what not in self._known:
            twin = self._masked_twin()
            with torch.random.fork_rng():  # dropout draws, and pruning does not move anyone's generator
                self._known[what] = compute(twin)
        return self._known[what]

    def _masked_twin(self) -> nn.Module:
        if self._twin is None:
            self._twin = _dense_twin(self._model)
            for parameter in self._twin.parameters():
                parameter.requires_grad_(False)
            self._weights = {name: _parameter(self._twin, name).clone() for name in self._names}
        for name in self._names:
            weight = _parameter(self._twin, name)
            weight.data.copy_(self._weights[name] * self._alive[name])
            weight.requires_grad_(True)
        return self._twin

    def _examples(self) -> list[tuple[Any, Any]]:
        if not self._batches:
            raise ValueError(
                f"{self._names[0]}: Expected data=, a batch (x, y) or several, for this criterion, got none"
            )
        return self._batches

    def _losses(self, twin: nn.Module):
        """Each batch's share of the mean loss, differentiable."""
        batches = self._examples()
        sizes = [len(y) if isinstance(y, Tensor) and y.dim() else 1 for _, y in batches]
        for (x, y), size in zip(batches, sizes, strict=True):
            yield self._loss(call(twin, x), y) * (size / sum(sizes))

    def _sum(self, twin: nn.Module, of: Callable[[Tensor, list[Tensor]], Any]) -> dict[str, Tensor]:
        weights = [_parameter(twin, name) for name in self._names]
        total = [torch.zeros_like(weight) for weight in weights]
        for loss in self._losses(twin):
            for sums, part in zip(total, of(loss, weights), strict=True):
                if part is not None:
                    sums += part.detach()
        return dict(zip(self._names, total, strict=True))

    def _gradients(self, twin: nn.Module) -> dict[str, Tensor]:
        return self._sum(twin, lambda loss, weights: torch.autograd.grad(loss, weights, allow_unused=True))

    def _hessian_gradients(self, twin: nn.Module) -> dict[str, Tensor]:
        gradient = [self.gradient(name) for name in self._names]

        def product(loss: Tensor, weights: list[Tensor]):
            parts = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            along = sum((p * g).sum() for p, g in zip(parts, gradient, strict=True) if p is not None)
            return torch.autograd.grad(along, weights, allow_unused=True)

        return self._sum(twin, product)

    def _flows(self, twin: nn.Module) -> dict[str, Tensor]:
        x = self._examples()[0][0]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{self._names[0]}: Expected data= with one floating-point input for a flow, got {got}")
        tensors = {
            name: tensor.detach().double().abs() if tensor.is_floating_point() else tensor
            for name, tensor in (*twin.named_parameters(), *twin.named_buffers())
        }
        weights = [tensors[name].requires_grad_() for name in self._names]
        flags = {module: module.training for module in twin.modules()}
        twin.eval()  # batch norms become the linear maps that the theory is about
        try:
            output = torch.func.functional_call(twin, tensors, (torch.ones_like(x[:1], dtype=torch.float64),))
        finally:
            for module, flag in flags.items():
                module.training = flag
        found = torch.autograd.grad(_total(output), weights, allow_unused=True)
        zeros = (torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True))
        return dict(zip(self._names, zeros, strict=True))

    @torch.no_grad()
    def _input_rms(self, twin: nn.Module) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(self._names, 0)

        def watcher(name: str):
            def watch(module: nn.Module, args: tuple) -> None:
                channel = -3 if isinstance(module, nn.Conv2d) else -2 if isinstance(module, nn.Conv1d) else -1
                x = args[0].detach().movedim(channel, -1).flatten(0, -2).float()
                sums[name] = sums.get(name, 0) + x.square().sum(0)
                counts[name] += len(x)

            return watch

        handles = [_module(twin, name).register_forward_pre_hook(watcher(name)) for name in self._names]
        try:
            for x, _ in self._examples():
                call(twin, x)
        finally:
            for handle in handles:
                handle.remove()
        if missing := [name for name in self._names if not counts[name]]:
            raise ValueError(f"{missing[0]}: Expected a layer that the forward pass reaches, got one it does not")
        return {name: (sums[name] / counts[name]).sqrt() for name in self._names}


def batches_of(data: Any) -> list[tuple[Any, Any]]:
    """``data`` as a list of batches ``(x, y)``; raises TypeError or ValueError on anything else."""
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor | Mapping):
        return [(data[0], data[1])]
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(f"Expected data as a batch (x, y) or an iterable of them, got {type(data).__name__}")
    batches = list(data)
    if not batches or any(not isinstance(batch, tuple | list) or len(batch) != 2 for batch in batches):
        raise ValueError("Expected data as a batch (x, y) or at least one in an iterable, got something else or none")
    return [(x, y) for x, y in batches]


def call(model: nn.Module, x: Any) -> Any:
    """``model`` on one input, a tuple of arguments or a dict of them."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def _total(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.sum()
    return sum(_total(part) for part in (output.values() if isinstance(output, Mapping) else output))


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _parameter(model: nn.Module, name: str) -> Tensor:
    return getattr(_module(model, name), name.rpartition(".")[2])


def _dense_twin(model: nn.Module) -> nn.Module:
    """A copy with plain layers: sparse ones unpacked, masks of ``torch.nn.utils.prune`` multiplied in."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        weight = module.__dict__.get("weight")
        if "weight_orig" in module._parameters and isinstance(weight, Tensor):
            memo[id(weight)] = weight.detach().clone()  # a non-leaf, which deepcopy refuses
    twin = copy.deepcopy(model, memo)
    swaps = {id(module): module.to_dense() for module in twin.modules() if hasattr(module, "dense_class")}
    for module in list(twin.modules()):
        if "weight_orig" in module._parameters:
            torch_prune.remove(module, "weight")
        for name, child in module._modules.items():
            if id(child) in swaps:
                module._modules[name] = swaps[id(child)]
    return swaps.get(id(twin), twin)
