"""A training step written out, for perceptrons: the calls that autograd and torch.optim would end in, and nothing else.

A sparse LeNet's products take less time than the graph, the loss and the optimizer's bookkeeping around them. Every
weight and every state of the optimizer ends with the bits that torch's own loop gives it. What is only looked at, the
logits of an evaluation, comes from one call for all layers, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from .. import _native
from .. import format as formats
from ..autograd import Guard
from ..nn import SparseLinear, SparseModule
from ..nn.fuse import Applied, Shortened
from ..nn.operations import hooked
from ..nn.stack import Stack, StackedLinear

__all__ = ["direct_logits", "direct_step"]

_log_softmax_backward = torch.ops.aten._log_softmax_backward_data.default
_relu_backward = torch.ops.aten.threshold_backward.default
_CSR = formats.get("csr")
_state_names = ("exp_avg", "exp_avg_sq", "step")


def direct_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None] | None:
    """``step(x, y)`` that trains ``model`` on the mean cross-entropy of a batch; None where it cannot be written out.

    It can for an ``nn.Sequential`` of a flattening, linear layers of any format and ReLUs on the CPU, with no hooks,
    all its parameters trained, and for a :class:`~sparsekit.nn.stack.Stack` of such (``x`` as the stack takes it,
    ``y [R, N]``, the replicates' means summed). Gradients are not kept in ``parameter.grad``.
    """
    stack, modules = model if isinstance(model, Stack) else None, _modules(model)
    if modules is None:
        return None
    layers = [_Linear(module, relu, not number) for number, (module, relu) in enumerate(modules)]
    parameters = [p for layer in layers for p in layer.parameters]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if {id(p) for p in parameters} != {id(p) for p in trained} or not all(map(_plain, parameters)):
        return None
    update, count = _update(optimizer, parameters), 1 if stack is None else len(stack.models)
    apart, last = stack is not None and not stack.shared_input, len(layers) - 1
    loss_gradient = _LossGradient()

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> None:
        if apart:
            x = x.transpose(0, 1)
        outputs = [x.flatten(1)]
        for layer in layers:
            outputs.append(layer.forward(outputs[-1]))
        dy = loss_gradient(outputs.pop(), y, count)
        gradients: list[Tensor] = []
        for number in range(last, -1, -1):
            layer = layers[number]
            if layer.relu and number < last:
                dy = _relu_backward(dy, outputs[number + 1], 0)
            dy, *own = layer.backward(dy, outputs[number])
            gradients[:0] = own[: len(layer.parameters)]
        update(gradients)

    return step


def direct_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What ``model(x)`` gives, in one call where all layers are ``csr``; else ``model`` itself. Not differentiable."""
    stack, modules = model if isinstance(model, Stack) else None, _modules(model)
    if modules is None or _native.lacks_cpu() or not all(_is_csr(module) for module, _ in modules):
        return model
    index = [m.index if isinstance(m, StackedLinear) else [m._buffers[n] for n in _CSR.index_names] for m, _ in modules]
    crow, col, keys = ([each[i] for each in index] for i in range(3))
    values, biases = [m.values for m, _ in modules], [m.bias for m, _ in modules]
    activations = ["relu" if relu else "none" for _, relu in modules]

    @torch.no_grad()
    def logits(x: Tensor) -> Tensor:
        if stack is not None and not stack.shared_input:
            x = x.transpose(0, 1)
        y = torch.ops.sparsekit.csr_chain.default(x.flatten(1), values, crow, col, biases, keys, activations)
        return y if stack is None else y.unflatten(1, (len(stack.models), -1)).transpose(0, 1)

    return logits


def _is_csr(module: nn.Module) -> bool:
    csr = module.how == "csr" if isinstance(module, StackedLinear) else getattr(module, "format", None) is _CSR
    return csr and module.values.is_cpu and module.values.dtype in (torch.float32, torch.float64)


class _Linear:
    """A linear layer with the ReLU after it: ``forward(x)``, and ``backward(dy, x)`` for dx, dvalues and dbias."""

    def __init__(self, module: nn.Module, relu: bool, first: bool) -> None:
        # Everything is looked up once: a module's attributes cost as much as a small product.
        self.relu, values, bias = relu, module.weight if type(module) is nn.Linear else module.values, module.bias
        self.parameters = [values] if bias is None else [values, bias]
        needs = (not first, True, bias is not None)
        fused, self._relu = False, torch.ops.aten.relu_.default
        if isinstance(module, SparseModule):
            fmt, shape = module.format, module.shape
            with torch.enable_grad():  # a backward is due: what it needs of the index is built, of a mask held again
                index = module._index(values.detach() if first else values)
            fused = relu and "relu" in fmt.epilogue
            epilogue = ("relu",) if fused else ()
            self._product = lambda x: fmt.linear(x, values, bias, index, shape, *epilogue)
            self.backward = lambda dy, x: fmt.linear_backward(dy, x, values, index, shape, needs)
        elif isinstance(module, StackedLinear):
            self._product = module.forward
            self.backward = lambda dy, x: module.gradients(dy, x, needs)
        else:
            self._product = lambda x: F.linear(x, values, bias)
            self.backward = lambda dy, x: (
                dy @ values if needs[0] else None, dy.t() @ x, dy.sum(0) if needs[2] else None
            )  # fmt: skip
        self.forward = self._product if fused or not relu else self._activated

    def _activated(self, x: Tensor) -> Tensor:
        return self._relu(self._product(x))


def _modules(model: nn.Module) -> list[tuple[nn.Module, bool]] | None:
    """The linear layers of a plain perceptron, or of a stack of them, in order, each with whether a ReLU follows."""
    model = model.network if isinstance(model, Stack) else model
    if type(model) not in (nn.Sequential, Shortened) or torch.is_autocast_enabled("cpu"):
        return None
    first, *rest = [*model] or [model]
    if hooked(model) or any(map(hooked, model)):
        return None
    if type(first) is not nn.Flatten or (first.start_dim, first.end_dim) != (1, -1):
        return None
    found: list[tuple[nn.Module, bool]] = []
    for module in rest:
        if type(module) is nn.ReLU and found:
            found[-1] = (found[-1][0], True)
        elif type(module) in (nn.Linear, StackedLinear) or isinstance(module, SparseLinear):
            activation = getattr(module, "activation", "none")
            if activation not in ("none", "relu"):
                return None
            found.append((module, activation == "relu"))
        elif type(module) not in (Applied, nn.Identity):
            return None
    return found if found and not found[-1][1] else None  # what a ReLU gives are no logits


def _plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is trained on the CPU and nobody but its mask's guard sees its gradient."""
    foreign = [hook for hook in (parameter._backward_hooks or {}).values() if not isinstance(hook, Guard)]
    seen = foreign or parameter._post_accumulate_grad_hooks or parameter.grad is not None
    return type(parameter) is nn.Parameter and parameter.requires_grad and parameter.is_cpu and not seen


class _LossGradient:
    """The gradient of the summed mean cross-entropies of R replicates: ``logits [N, R * classes]``, ``y [R, N]`` (for
    one, ``[N]``)."""

    _rows: Tensor | None = None
    _made: tuple | None = None

    def __call__(self, logits: Tensor, y: Tensor, count: int) -> Tensor:
        samples, wide = logits.shape
        if self._made != (samples, wide):  # a label's row: what the likelihoods of its classes weigh
            self._made = samples, wide
            self._rows = torch.eye(wide // count, dtype=logits.dtype).mul_(-1 / samples)
        if y.dim() > 1:
            y, logits = y.t().flatten(), logits.view(samples * count, wide // count)
        found = _log_softmax_backward(
            self._rows.index_select(0, y), torch.log_softmax(logits, 1), 1, logits.dtype
        )  # fmt: skip
        return found.view(samples, wide)


def _update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Callable[[Sequence[Tensor]], None]:
    """The optimizer's step with these gradients; of a plain fused Adam, the kernel that it calls, on its own state."""
    state: list[list[Tensor]] = []

    def by_itself(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def update(gradients: Sequence[Tensor]) -> None:
        if not state:  # the first step makes the state, and tells a scheduler that there was one
            by_itself(gradients)
            state.extend([optimizer.state[p][name] for p in parameters] for name in _state_names)
            return
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(state[2], 1)
        torch._fused_adam_(
            parameters, gradients, state[0], state[1], [], state[2], lr=group["lr"], beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip

    return update if _is_fused_adam(optimizer) else by_itself


def _is_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    own = vars(optimizer)
    watched = own.get("_optimizer_step_pre_hooks") or own.get("_optimizer_step_post_hooks")
    if watched or optimizers._global_optimizer_pre_hooks or optimizers._global_optimizer_post_hooks:
        return False
    if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    other = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
    return bool(group["fused"]) and isinstance(group["lr"], float) and not any(group.get(name) for name in other)
