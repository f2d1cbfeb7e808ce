"""Chains: linear layers that follow each other as one call, activations packed between them, or one autograd node."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .. import _native
from .. import format as formats
from ..autograd import in_cxx_chain
from ..functional import transformed
from ..plan import NOISE, measure
from .linear import SparseLinear
from .operations import hooked
from .planning import thunk

__all__ = ["LINKED", "Done", "link", "unlink"]

_CSR = formats.get("csr")
_csr_chain, _csr_linear = torch.ops.sparsekit.csr_chain.default, torch.ops.sparsekit.csr_linear.default
_BATCH = 64  # that a chain is measured with where the plan knows of none
_DTYPES = (torch.float32, torch.float64)


class _Head(SparseLinear):
    """Computes itself and the layers after it: in one call, or with gradients as one node of torch's graph."""

    chain: list[SparseLinear]
    exact = False
    """Whether results must have the bits that the layers give: then one call serves gradients only."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._traced(input)
        grad = torch.is_grad_enabled()
        if not (grad or self.exact) and (y := in_cxx_chain(input, self.chain)) is not NotImplemented:
            return y
        if (self.exact and not grad) or not self._together(input):
            for layer in self.chain:
                input = SparseLinear.forward(layer, input)
            return input
        own, index = [m._parameters for m in self.chain], [m._buffers for m in self.chain]
        values, biases = [parameters["values"] for parameters in own], [parameters["bias"] for parameters in own]
        if grad:
            return _Chain.apply(input, self.chain, *values, *biases)
        return _csr_chain(
            input,
            values,
            [buffers["crow_indices"] for buffers in index],
            [buffers["col_indices"] for buffers in index],
            biases,
            [buffers["code_key"] for buffers in index],
            [m.activation for m in self.chain],
        )

    def _together(self, x: Tensor) -> bool:
        """Whether nothing asks for a graph or another dtype, and all layers are as they were linked."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or transformed():
            return False
        if not x.is_cpu or x.dim() != 2 or x.shape[1] != self.in_features or x.dtype not in _DTYPES:
            return False
        if torch.is_grad_enabled() and any([m.activation not in ("none", "relu") for m in self.chain]):
            return False  # their gradients need what went into them
        return all([m.format is _CSR and m._parameters["values"].dtype is x.dtype for m in self.chain])


class _Chain(torch.autograd.Function):
    """Linear layers with ReLU or nothing between them; ``rest`` is all their values, then all their biases."""

    @staticmethod
    def forward(ctx, x, layers, *rest):
        count, steps = len(layers), [x]
        ctx.index = [_index(layer, number or x.requires_grad) for number, layer in enumerate(layers)]
        for layer, values, bias, index in zip(layers, rest[:count], rest[count:], ctx.index, strict=True):
            steps.append(_csr_linear(steps[-1], values, index[0], index[1], bias, index[2], layer.activation))
        ctx.save_for_backward(*steps, *rest)
        ctx.activations, ctx.shapes = [layer.activation for layer in layers], [layer.shape for layer in layers]
        return steps[-1]

    @staticmethod
    def backward(ctx, dy):
        count = len(ctx.index)
        steps, rest = ctx.saved_tensors[: count + 1], ctx.saved_tensors[count + 1 :]
        if torch.is_grad_enabled():  # a gradient of a gradient: through the dense weights
            return _again(ctx, dy, steps[0], rest)
        needs = ctx.needs_input_grad
        grads = [None] * (2 * count)
        for i in reversed(range(count)):
            if ctx.activations[i] == "relu":
                dy = torch.ops.aten.threshold_backward(dy, steps[i + 1], 0)
            wanted = bool(i) or needs[0], needs[2 + i], needs[2 + count + i]
            found = _CSR.linear_backward(dy, steps[i], rest[i], ctx.index[i], ctx.shapes[i], wanted)
            dy, grads[i], grads[count + i] = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        return dy, None, *grads


def _again(ctx, dy: Tensor, x: Tensor, rest: tuple[Tensor | None, ...]):
    """The gradients by operations that torch can differentiate once more."""
    count = len(ctx.index)
    y = x
    for i, index in enumerate(ctx.index):
        named = dict(zip(_CSR.index_names, index, strict=True))
        y = F.linear(y, _CSR.scatter(rest[i], named, torch.Size(ctx.shapes[i])), rest[count + i])
        y = y.relu() if ctx.activations[i] == "relu" else y
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
    inputs = [tensor for tensor, want in zip((x, *rest), needs, strict=True) if want]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    first, *others = (next(found) if want else None for want in needs)
    return first, None, *others


def _index(layer: SparseLinear, inner: bool) -> formats.Index:
    if inner and layer._buffers["t_crow"] is None:
        layer.derive()
    return tuple([layer._buffers[name] for name in _CSR.index_names])


class Done(SparseLinear):
    """A later layer of a chain: what it would compute is computed."""

    def forward(self, input: Tensor) -> Tensor:
        return self._traced(input) if isinstance(input, Proxy) else input


LINKED = (_Head, Done)


def unlink(model: nn.Module) -> None:
    """Let the layers of every chain in ``model`` compute themselves again."""
    for head in [module for module in model.modules() if type(module) is _Head]:
        layers = head.__dict__.pop("chain")
        head.__dict__.pop("exact", None)
        for layer in layers:
            layer.__class__ = SparseLinear
        if head.plan is not None:
            head.plan = replace(head.plan, note="")


def link(model: nn.Module, pairs: Iterable[tuple[nn.Module, str]], dense: bool) -> None:
    """Make chains of the sparse linear layers of ``model`` wherever one call measures faster than theirs.

    ``pairs``: each layer with the path of the module that alone reads what it gives. A model in training mode is
    measured forward and backward. ``dense``: layers of other formats join as ``csr``; without, no bit of a
    result depends on what was measured.
    """
    after = {layer: model.get_submodule(path) for layer, path in pairs}
    after = {layer: follower for layer, follower in after.items() if _fits(layer) and _fits(follower)}
    if _native.lacks_cpu():
        return
    for first in after.keys() - set(after.values()):
        run = [first]
        while run[-1] in after:
            run.append(after[run[-1]])
        if not (dense and _join(run, model.training)):
            for stretch in _stretches(run):
                if _join(stretch, model.training):
                    stretch[0].exact = not dense


def _fits(layer: nn.Module) -> bool:
    if type(layer) is not SparseLinear or hooked(layer):
        return False
    planned = layer.plan is not None and not layer.plan.forced
    if layer.format.name not in ("csr", "dense", "lanes" if planned else "csr"):
        return False
    return layer.values.is_cpu and layer.values.dtype in _DTYPES


def _stretches(run: list[SparseLinear]) -> list[list[SparseLinear]]:
    """The pieces of a run that are ``csr`` already."""
    pieces: list[list[SparseLinear]] = [[]]
    for layer in run:
        if layer.format.name == "csr":
            pieces[-1].append(layer)
        else:
            pieces.append([])
    return pieces


def _join(run: list[SparseLinear], training: bool) -> bool:
    """Put a run into one call when that is faster than calling its layers, all of them as ``csr`` then."""
    if len(run) < 2 or all(layer.format.name == "dense" for layer in run):
        return False
    x = torch.randn(_rows(run[0]), run[0].in_features, generator=torch.Generator().manual_seed(0))
    x, twin = x.to(run[0].values.dtype), _chained(copy.deepcopy(run))
    times = measure({name: thunk(nn.Sequential(*m), x, training) for name, m in (("apart", run), ("chain", twin))})
    if times["chain"] * NOISE > times["apart"] or sum(m.bytes() for m in twin) > sum(m.bytes() for m in run):
        return False
    names = ", ".join(layer.layer_name or "a layer" for layer in run)
    note = f"{names} run in one call, {times['chain']:.1f} us for {times['apart']:.1f}"
    for layer in _chained(run):
        if layer.plan is not None:
            layer.plan = replace(layer.plan, chosen="csr", note=note if layer is run[0] else "")
    return True


def _chained(run: list[SparseLinear]) -> list[SparseLinear]:
    for layer in run:
        layer.set_format("csr")
        layer.__class__ = Done
    run[0].__class__, run[0].chain = _Head, run
    return run


def _rows(layer: SparseLinear) -> int:
    """The samples that a layer was planned for."""
    shape = () if layer.plan is None or layer.plan.assumed else layer.plan.input_shape
    return prod(shape[:-1]) if shape else _BATCH
