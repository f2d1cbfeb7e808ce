"""fuse: batch norms folded into convolutions, activations made part of products, linear layers made one call."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from ..prune import check_model
from .base import SparseModule
from .bordered import BorderedConv2d
from .chain import Done, link
from .conv import SparseConv2d
from .joined import join
from .kept import keep
from .linear import SparseLinear
from .operations import hooked
from .pool import Pooled

__all__ = ["Applied", "Shortened", "fuse", "streamline"]

_CONVOLUTIONS = (SparseConv2d, nn.Conv2d, BorderedConv2d)


class Applied(nn.Module):
    """Stands where an activation was that the layer before it now applies; ``to_dense`` puts it back."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class Shortened(nn.Sequential):
    """Calls those of its modules alone that have something to do; ``to_dense`` makes it an ``nn.Sequential`` again."""

    def forward(self, input: Tensor) -> Tensor:
        """``x`` through all modules."""
        for module in self._modules.values():
            if type(module) not in _PASSED or module._forward_hooks or module._forward_pre_hooks:
                input = module(input)
        return input


_PASSED = (Applied, Done, nn.Identity)


def fuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Make calls of a converted model cheaper: fold batch norms, fuse activation modules, link linear layers.

    A sparse layer whose output goes to one ``nn.ReLU``, ``nn.GELU()`` or ``nn.SiLU`` alone applies it itself, inside
    the kernel where the format's kernels can. Linear layers that then follow each other run as one call on the CPU
    (with gradients, as one node of torch's graph), where that measured faster on the batch they were planned for
    (:func:`explain` says so). In eval mode a convolution, sparse or not, whose output goes to one
    ``nn.BatchNorm2d`` alone takes over its scale and shift: the same function up to rounding.

    In eval mode a sparse convolution whose output is added to something, as in a residual block, does that itself, and
    applies the ReLU after the sum; the ReLU may be a function, or a module called more than once. The block's forward
    then runs as torch.fx traced it: numbers and flags that its code reads are constants.

    In eval mode ``csr`` convolutions that feed each other, and the pools between them, hand on their results as those
    read them, in padded planes, where that measured faster on the input that they were planned for. Whoever else sees
    such a result sees a tensor.

    In eval mode plain ``nn.MaxPool2d`` of contiguous images run through a kernel that is vectorised where torch's is
    not.

    Who feeds whom is read by ``torch.fx``; in a model that it cannot trace nothing is fused, with a warning. Save a
    model before folding its norms: their keys are gone after.

    Returns a deep copy unless ``inplace``. Fuse before an optimizer is made: a layer may change its format.
    """
    check_model(model)
    if not inplace:
        model = copy.deepcopy(model)
    try:
        _fuse(model, dense=True)
    except _Untraceable as error:
        warnings.warn(f"{type(model).__name__}: nothing fused, torch.fx cannot trace it ({error})", stacklevel=2)
    return model


def streamline(model: nn.Module) -> None:
    """Fuse a model for training, in place: no layer changes its format and no bit of a result. What torch.fx cannot
    trace stays as it is."""
    if any(isinstance(module, SparseModule) for module in model.modules()):
        with contextlib.suppress(_Untraceable):
            _fuse(model, dense=False)


def _fuse(model: nn.Module, dense: bool) -> None:
    for step in (_activate,) if model.training else (_fold, _activate):
        for layer, path in _pairs(model):
            step(model, layer, path)
    link(model, _pairs(model), dense)
    if not model.training:
        join(model)
    for path, module in [] if model.training else list(model.named_modules()):
        if path and Pooled.can_replace(module):
            model.set_submodule(path, Pooled(module))
    for module in model.modules():
        if type(module) is nn.Sequential and any(isinstance(child, Applied | Done) for child in module):
            module.__class__ = Shortened
    if not model.training:
        keep(model, _PASSED)


class _Untraceable(Exception):
    pass


def _fold(model: nn.Module, layer: SparseModule, path: str) -> None:
    norm = model.get_submodule(path)
    # Not BatchNorm1d: after a linear layer it may normalise any axis of a sequence.
    if type(layer) not in _CONVOLUTIONS or type(norm) is not nn.BatchNorm2d or hooked(norm):
        return
    if getattr(layer, "activation", "none") != "none" or not {"weight", "values"} & layer._parameters.keys():
        return  # a weight under torch.nn.utils.prune or weight_norm is made anew in every call
    if norm.running_mean is None or norm.training:
        return
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        if layer.bias is not None:
            shift = shift + layer.bias * scale
        weight, dtype = layer.weight.to(scale.dtype) * scale.view(-1, 1, 1, 1), layer.weight.dtype
        if isinstance(layer, SparseModule):
            layer.values.copy_(layer.pack(weight.to(dtype)))
            layer.shed()
        else:
            layer.weight = nn.Parameter(weight.to(dtype), layer.weight.requires_grad)
        if isinstance(layer, BorderedConv2d):
            layer.edge.mul_(scale.view(-1, 1, 1))
        trained = next(layer.parameters()).requires_grad
        layer.bias = nn.Parameter(shift.to(dtype), requires_grad=trained)
    model.set_submodule(path, nn.Identity())


def _activate(model: nn.Module, layer: SparseModule, path: str) -> None:
    activation = model.get_submodule(path)
    name = _name(activation)
    if name is not None and getattr(layer, "activation", "") == "none" and not activation._forward_hooks:
        layer.activation, layer._guarded = name, None
        model.set_submodule(path, Applied(activation))


def _name(module: nn.Module) -> str | None:
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, SparseModule | BorderedConv2d) or super().is_leaf_module(module, path)


def _pairs(model: nn.Module) -> list[tuple[SparseModule, str]]:
    """Each sparse layer called once, with the path of the module that alone reads its output, called once too."""
    names: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = names.get(id(module), 0) + 1
    try:
        found = list(_traced(model))
    except Exception as error:  # fx raises whatever the traced code raises on its proxies
        raise _Untraceable(error) from None
    return [(layer, path) for layer, path in found if names[id(layer)] == names[id(model.get_submodule(path))] == 1]


def _traced(model: nn.Module) -> Iterator[tuple[SparseModule, str]]:
    nodes = [node for node in _Tracer().trace(model).nodes]
    calls: dict[str, int] = {}
    for node in nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in nodes:
        if node.op != "call_module" or calls[node.target] != 1 or len(node.users) != 1:
            continue
        layer, reader = model.get_submodule(node.target), next(iter(node.users))
        while reader.op == "call_module" and type(model.get_submodule(reader.target)) is nn.Identity:
            if len(reader.users) != 1 or calls[reader.target] != 1:
                break
            reader = next(iter(reader.users))
        alone = reader.op == "call_module" and calls[reader.target] == 1 and reader.args[:1] != ()
        if type(layer) in (SparseLinear, *_CONVOLUTIONS) and alone:
            yield layer, reader.target
