"""Replicates side by side: networks of one architecture stacked into a wide one, so that a step trains them all.

A layer of R replicates is block-diagonal: R times the outputs, each block on its own slice of the inputs.
A sparse kernel does not see the zeros between the blocks, so the arithmetic is that of R small layers in
one call, and optimizer, loss and Python are paid once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import format as formats
from ..functional import sparse_linear
from ..plan import choose
from .base import SparseModule
from .conv import SparseConv2d

__all__ = ["Stack", "StackedLinear"]

_ALONE = (
    nn.Identity, nn.Flatten, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
"""Layers that treat every unit or channel alone, and so serve a stack as they are."""

_CSR = formats.get("csr")


class Stack(nn.Module):
    """``models`` (converted or dense, one architecture, masks of their own) as one network, trained together.

    ``x [N, ...]`` with ``shared_input`` (every replicate sees the same batch), else ``[R, N, ...]``, to
    ``[R, N, ...]``. Weights, gradients and optimizer steps of a replicate are those it would have alone, up to
    rounding, for optimizers that treat each weight alone (SGD, Adam, …; not with a gradient norm over all).
    Layers that are ``csr`` in all models run as one ``csr`` product; others as that or as a batched dense one,
    whichever ``example_input`` (one replicate's batch) measures faster, forward and backward. :meth:`write_back` hands
    the weights to ``models``.

    Raises: ValueError naming the layer for models that differ in more than weights and masks, for layers that
    mix units (only linear, 2-D convolution, batch norm, activations and pooling may occur), or for a forward
    that keeps the replicates from staying apart.
    """

    def __init__(self, models: Sequence[nn.Module], example_input: Tensor, shared_input: bool = False) -> None:
        super().__init__()
        if not models:
            raise ValueError("Expected models to stack, got none")
        self.models, self.shared_input = list(models), shared_input
        self._slices: list[tuple[nn.Module, str, list[int]]] = []
        self._leaves: list[tuple[str, nn.Module]] = []
        inputs, first = _record(self.models[0], example_input)
        swaps = {}
        for path, module in self.models[0].named_modules():
            if next(module.children(), None) is None:
                parts = [_same(path, module, model) for model in self.models]
                whole = self._stacked(path, parts, path in first, inputs.get(path))
                self._leaves.append((path, whole))
                swaps[id(module)] = whole
            elif own := [*module._parameters, *module._buffers]:
                raise ValueError(f"{path or 'model'}: Expected parameters in layers only, got {', '.join(own)}")
        self.network = copy.deepcopy(self.models[0], dict(swaps))
        self.train(self.models[0].training)
        self._check(example_input)

    def forward(self, x: Tensor) -> Tensor:
        count = len(self.models)
        if not self.shared_input:
            if x.dim() < 2 or x.shape[0] != count:
                raise ValueError(f"Expected an input of {count} replicates [{count}, N, ...], got {list(x.shape)}")
            x = x.transpose(0, 1).flatten(1, 2)
        y = self.network(x)
        return y.unflatten(1, (count, -1)).transpose(0, 1)

    def state(self, replicate: int) -> list[Tensor]:
        """Views of everything that training changes in one replicate: survivors, biases, batch-norm statistics."""
        return [getattr(m, name).detach()[at[replicate] : at[replicate + 1]] for m, name, at in self._slices]

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy each replicate's weights and statistics into the model it came from."""
        for path, whole in self._leaves:
            for number, model in enumerate(self.models):
                module = model.get_submodule(path)
                if isinstance(whole, nn.BatchNorm2d):
                    for name in ("weight", "bias", "running_mean", "running_var"):
                        if (own := getattr(module, name)) is not None:
                            own.copy_(getattr(whole, name).view(len(self.models), -1)[number])
                    if module.num_batches_tracked is not None:
                        module.num_batches_tracked.copy_(whole.num_batches_tracked)
                elif _is_layer(module):
                    weight = whole.replicate_weight(number)
                    if isinstance(module, SparseModule):
                        module.values.copy_(module.pack(weight))
                    else:
                        module.weight.copy_(weight)
                    if module.bias is not None:
                        module.bias.copy_(whole.bias.view(len(self.models), -1)[number])

    def _stacked(self, path: str, parts: list[nn.Module], first: bool, x: Tensor | None) -> nn.Module:
        if isinstance(parts[0], nn.BatchNorm2d | nn.BatchNorm1d):
            return self._norm(parts)
        if _is_layer(parts[0]):
            return self._layer(path, parts, first, x)
        if isinstance(parts[0], _ALONE):
            return copy.deepcopy(parts[0])
        raise ValueError(f"{path}: Expected a layer that keeps units apart, got {type(parts[0]).__name__}")

    def _norm(self, parts: list[nn.Module]) -> nn.Module:
        whole = copy.deepcopy(parts[0])
        whole.num_features *= len(parts)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is None:
                continue
            joined = torch.cat([t.detach() for t in tensors])
            if isinstance(tensors[0], nn.Parameter):
                joined = nn.Parameter(joined, requires_grad=tensors[0].requires_grad)
            setattr(whole, name, joined)
            self._slices.append((whole, name, _offsets([len(t) for t in tensors])))
        return whole

    def _layer(self, path: str, parts: list[nn.Module], first: bool, x: Tensor | None) -> nn.Module:
        shape, shared = parts[0].weight.shape, first and self.shared_input
        masks = [p.survivors() if isinstance(p, SparseModule) else torch.ones(shape, dtype=torch.bool) for p in parts]
        weights = [part.weight.detach() for part in parts]
        if shared and getattr(parts[0], "groups", 1) != 1:
            raise ValueError(f"{path}: Expected a first layer without groups to share the input, got {parts[0].groups}")
        make = StackedLinear if len(shape) == 2 else _conv
        sparse = all(isinstance(part, SparseModule) and part.format is _CSR for part in parts)
        candidates = {} if sparse else {"dense": make(parts, weights, masks, shared, "dense")}
        if sparse or not all(bool(mask.all()) for mask in masks):
            candidates["csr"] = make(parts, weights, masks, shared, "csr")
        chosen = "csr" if sparse else "dense"
        if len(candidates) > 1 and x is not None:
            wide = x if shared else torch.cat([x] * len(parts), 1)
            chosen = choose({name: _step(layer, wide, not first) for name, layer in candidates.items()})[0]
        whole = candidates[chosen]
        counts = [int(mask.sum()) for mask in masks] if chosen == "csr" else [shape[0]] * len(parts)
        self._slices.append((whole, "values", _offsets(counts)))
        if whole.bias is not None:
            self._slices.append((whole, "bias", _offsets([shape[0]] * len(parts))))
        return whole

    @torch.no_grad()
    def _check(self, x: Tensor) -> None:
        """A forward may reshape or mix units as it likes; what it gives tells whether the replicates kept apart."""
        flags = {module: module.training for model in (self, *self.models) for module in model.modules()}
        try:
            for model in (self, *self.models):
                model.eval()
            together = self(x if self.shared_input else torch.stack([x] * len(self.models)))
            alone = torch.stack([model(x) for model in self.models])
        finally:
            for module, flag in flags.items():
                module.training = flag
        if together.shape != alone.shape or not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
            raise ValueError("Expected a forward that treats units alone between its layers, got one that mixes them")


class StackedLinear(nn.Module):
    """R linear layers: ``x [N, R * in]`` (or the shared ``[N, in]``) to ``[N, R * out]``."""

    def __init__(self, parts, weights, masks, shared: bool, how: str) -> None:
        super().__init__()
        self.count, self.how, self.shared = len(parts), how, shared
        out, inputs = self.part_shape = weights[0].shape
        self.shape = torch.Size((out * self.count, inputs if shared else inputs * self.count))
        self.indices = [_CSR.index(mask) if how == "csr" else None for mask in masks]
        if how == "csr":
            values = torch.cat([_CSR.gather(w, index) for w, index in zip(weights, self.indices, strict=True)])
            self.index = _diagonal(self.indices, 0 if shared else inputs, self.shape)
        else:
            values = torch.cat([torch.where(m, w, 0) for w, m in zip(weights, masks, strict=True)])
            pruned = torch.cat(masks).logical_not()
            self.register_buffer("pruned", pruned if bool(pruned.any()) else None)
        self.values = nn.Parameter(values)
        self.bias = None if parts[0].bias is None else nn.Parameter(torch.cat([p.bias.detach() for p in parts]))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "csr":
            return sparse_linear(x, self.values, self.index, self.shape, _CSR, self.bias)
        weight = self.values if self.pruned is None else self.values.masked_fill(self.pruned, 0)
        if self.shared:
            return F.linear(x, weight, self.bias)
        out, inputs = self.part_shape
        weight = weight.view(self.count, out, inputs).transpose(1, 2)
        y = x.view(-1, self.count, inputs).transpose(0, 1)
        y = y @ weight if self.bias is None else torch.baddbmm(self.bias.view(self.count, 1, out), y, weight)
        return y.transpose(0, 1).flatten(1)

    def gradients(self, dy: Tensor, x: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        """Those of x, values and bias, each only where ``needs`` says so, as autograd gives them."""
        if self.how == "csr":
            return _CSR.linear_backward(dy, x, self.values, self.index, self.shape, needs)
        if self.shared:
            dx, dvalues = dy @ self.values if needs[0] else None, dy.t() @ x
        else:
            out, inputs = self.part_shape
            apart = dy.view(-1, self.count, out).transpose(0, 1)
            dvalues = apart.transpose(1, 2) @ x.view(-1, self.count, inputs).transpose(0, 1)
            dx = apart @ self.values.view(self.count, out, inputs) if needs[0] else None
            dx, dvalues = None if dx is None else dx.transpose(0, 1).flatten(1), dvalues.view_as(self.values)
        if self.pruned is not None:
            dvalues.masked_fill_(self.pruned, 0)
        return dx, dvalues, dy.sum(0) if needs[2] else None

    def replicate_weight(self, number: int) -> Tensor:
        return _part(self.values, self.how, self.indices, self.part_shape, number)


def _conv(parts, weights, masks, shared: bool, how: str) -> SparseConv2d:
    """R convolutions as the groups of one, or, on a shared input, as the outputs of one."""
    first, count = parts[0], len(parts)
    weight = torch.cat(weights)
    dense = nn.Conv2d(
        first.in_channels * (1 if shared else count), first.out_channels * count, first.kernel_size, first.stride,
        first.padding, first.dilation, first.groups * (1 if shared else count), first.bias is not None,
        first.padding_mode, device="meta",
    )  # fmt: skip
    dense.weight = nn.Parameter(weight)
    if first.bias is not None:
        dense.bias = nn.Parameter(torch.cat([p.bias.detach() for p in parts]))
    whole = SparseConv2d.from_dense(dense, torch.cat(masks), how)
    indices, shape = [_CSR.index(mask) if how == "csr" else None for mask in masks], weights[0].shape
    whole.replicate_weight = lambda number: _part(whole.values, how, indices, shape, number)
    return whole


def _part(values: Tensor, how: str, indices, shape, number: int) -> Tensor:
    """The dense weight of one replicate."""
    if how == "dense":
        return values.detach().view(len(indices), *shape)[number]
    at = _offsets([index["col_indices"].numel() for index in indices])
    return _CSR.scatter(values.detach()[at[number] : at[number + 1]], indices[number], shape)


def _diagonal(indices, step: int, shape: torch.Size) -> formats.Index:
    """The index of the layers one below the other, each ``step`` columns to the right of the last."""
    starts = _offsets([index["col_indices"].numel() for index in indices])
    crow = [index["crow_indices"][:-1] + at for index, at in zip(indices, starts, strict=False)]
    whole = {
        "crow_indices": torch.cat([*crow, torch.tensor(starts[-1:], dtype=torch.int32)]).to(torch.int32),
        "col_indices": torch.cat([index["col_indices"] + number * step for number, index in enumerate(indices)]),
    }
    whole |= _CSR.prepare(whole, shape)
    whole |= _CSR.derive(whole, shape)
    return tuple(whole.get(name) for name in _CSR.index_names)


def _offsets(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, SparseModule) or type(module) in (nn.Linear, nn.Conv2d)


def _same(path: str, module: nn.Module, model: nn.Module) -> nn.Module:
    """The layer of another model at ``path``, of the same class (sparse or dense) and geometry."""
    try:
        other = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{path}: Expected models of one architecture, got one without it") from None
    if _geometry(other) != _geometry(module):
        got = f"{_geometry(module)} and {_geometry(other)}"
        raise ValueError(f"{path}: Expected layers of one class and geometry, got {got}")
    return other


def _geometry(module: nn.Module) -> tuple:
    if not _is_layer(module):
        return (type(module), module.extra_repr())
    kind = getattr(module, "dense_class", type(module))
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    rest = [getattr(module, name, None) for name in names]
    return (kind, tuple(module.weight.shape), module.bias is not None, getattr(module, "activation", "none"), *rest)


def _record(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], set[str]]:
    """Each layer's input in a forward of one model, and the layers that read the model's own input."""
    inputs: dict[str, Tensor] = {}
    first: set[str] = set()

    def keep(path):
        def hook(module, args):
            inputs[path] = args[0].detach()
            if args[0].data_ptr() == x.data_ptr() and args[0].numel() == x.numel():
                first.add(path)

        return hook

    flags = {module: module.training for module in model.modules()}
    handles = [m.register_forward_pre_hook(keep(path)) for path, m in model.named_modules() if _is_layer(m)]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags.items():
            module.training = flag
    return inputs, first


def _step(layer: nn.Module, x: Tensor, inner: bool):
    """Forward and backward of a layer, as training runs it; only an inner one owes its input a gradient."""
    with torch.no_grad():
        dy = torch.ones_like(layer(x))
    x = x.detach().requires_grad_(inner)
    wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]

    def run():
        with torch.enable_grad():
            return torch.autograd.grad(layer(x), wanted, dy)

    return run
