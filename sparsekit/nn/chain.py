"""Chains: linear layers that follow each other, computed by one call that keeps activations packed between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import _native
from .. import format as formats
from ..functional import transformed
from ..plan import NOISE, measure
from .linear import SparseLinear
from .operations import hooked

__all__ = ["Done", "link"]

_CSR = formats.get("csr")
_csr_chain = torch.ops.sparsekit.csr_chain.default
_BATCH = 64  # that a chain is measured with where the plan knows of none
_DTYPES = (torch.float32, torch.float64)


class _Head(SparseLinear):
    """Computes itself and the layers after it, in one call where nothing asks for a gradient or a graph."""

    chain: list[SparseLinear]

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._traced(input)
        if self._at_once(input):
            own, index = [m._parameters for m in self.chain], [m._buffers for m in self.chain]
            return _csr_chain(
                input,
                [parameters["values"] for parameters in own],
                [buffers["crow_indices"] for buffers in index],
                [buffers["col_indices"] for buffers in index],
                [parameters["bias"] for parameters in own],
                [buffers["code_key"] for buffers in index],
                [m.activation for m in self.chain],
            )
        for layer in self.chain:
            input = SparseLinear.forward(layer, input)
        return input

    def _at_once(self, x: Tensor) -> bool:
        """Whether nothing asks for a gradient, a graph or another dtype, and all layers are as they were linked."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if not x.is_cpu or x.dim() != 2 or x.shape[1] != self.in_features or transformed():
            return False
        if x.dtype not in _DTYPES:
            return False
        return all([m.format is _CSR and m._parameters["values"].dtype is x.dtype for m in self.chain])


class Done(SparseLinear):
    """A later layer of a chain: what it would compute is computed."""

    def forward(self, input: Tensor) -> Tensor:
        return self._traced(input) if isinstance(input, Proxy) else input


def link(model: nn.Module, pairs: Iterable[tuple[nn.Module, str]]) -> None:
    """Make chains of the sparse linear layers of ``model`` wherever one call measures faster than theirs.

    ``pairs``: each layer with the path of the module that alone reads what it gives.
    """
    after = {layer: model.get_submodule(path) for layer, path in pairs}
    after = {layer: follower for layer, follower in after.items() if _fits(layer) and _fits(follower)}
    if _native.lacks_cpu():
        return
    for first in after.keys() - set(after.values()):
        run = [first]
        while run[-1] in after:
            run.append(after[run[-1]])
        if not _join(run):
            for stretch in _stretches(run):
                _join(stretch)


def _fits(layer: nn.Module) -> bool:
    if type(layer) is not SparseLinear or layer.format.name not in ("csr", "dense") or hooked(layer):
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


def _join(run: list[SparseLinear]) -> bool:
    """Put a run into one call when that is faster than calling its layers, the dense ones among them as ``csr``."""
    if len(run) < 2 or all(layer.format.name != "csr" for layer in run):
        return False
    x = torch.randn(_rows(run[0]), run[0].in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(run[0].values.dtype)
    times = measure({"apart": _pass(run, x), "chain": _pass(_chained(copy.deepcopy(run))[:1], x)})
    if times["chain"] * NOISE > times["apart"]:
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


def _pass(layers: list[SparseLinear], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = x
        with torch.no_grad():
            for layer in layers:
                y = layer(y)
        return y

    return run


def _rows(layer: SparseLinear) -> int:
    """The samples that a layer was planned for."""
    shape = () if layer.plan is None or layer.plan.assumed else layer.plan.input_shape
    return prod(shape[:-1]) if shape else _BATCH
