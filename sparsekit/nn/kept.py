"""Runs of sparse convolutions and pools between which images stay as the convolutions read them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import fx, nn

from .. import _native
from .. import format as formats
from ..plan import NOISE, measure
from .base import SparseModule
from .bordered import BorderedConv2d
from .conv import SparseConv2d
from .operations import hooked
from .pool import Pooled

__all__ = ["keep"]

_CSR = formats.get("csr")


class _Tracer(fx.Tracer):
    """Sees a model's own code, and modules that foreign code watches as one call."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        own = isinstance(module, SparseModule | BorderedConv2d | Pooled)
        return own or hooked(module) or super().is_leaf_module(module, path)


def keep(model: nn.Module, passed: tuple[type, ...]) -> None:
    """Let the sparse convolutions of ``model``, and the pools between them, hand on planes where all who read those
    can, wherever that measures faster on the input that they were planned for. ``passed``: what returns its input.

    No module, name or forward changes; a layer that is given something else, or asked for a gradient, gives images.
    """
    if _native.lacks_cpu():
        return
    try:
        graph = _Tracer().trace(model)
    except Exception:  # fx raises whatever the traced code raises on its proxies
        return
    found = _Readers(model, graph, passed)
    for run in found.runs():
        _decide(model, graph, run, found)


class _Readers:
    """Who reads what in a graph, through modules that return their input."""

    def __init__(self, model: nn.Module, graph: fx.Graph, passed: tuple[type, ...]) -> None:
        self.model, self.passed = model, passed
        self.calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if (module := self.module(node)) is not None:
                self.calls[module].append(node)
        self.borders: dict[nn.Module, int] = {}
        for module in [m for m in reversed(self.calls) if type(m) in (SparseConv2d, Pooled)]:
            if (border := self._border(module)) is not None:
                self.borders[module] = border
        while idle := [m for m in self.borders if type(m) is Pooled and not self._fed(m)]:  # a pool of images
            for module in idle:
                del self.borders[module]
            for module in [m for m in self.borders if self._border(m) is None]:
                del self.borders[module]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def readers(self, node: fx.Node) -> list[tuple[fx.Node, int]]:
        """The calls that get a result, with its place among their arguments (-1: another than the first two)."""
        out = []
        for user in node.users:
            module = self.module(user)
            if type(module) in self.passed and not hooked(module) and user.args == (node,):
                out += self.readers(user)
            else:
                out += [(user, i if i < 2 else -1) for i, argument in enumerate(user.args) if argument is node]
                out += [(user, -1)] * (node in user.kwargs.values() or node not in user.args)
        return out

    def source(self, node: fx.Node) -> fx.Node:
        """The call whose result a node is."""
        while type(self.module(node)) in self.passed:
            node = node.args[0]
        return node

    def _border(self, module: nn.Module) -> int | None:
        """The border that the readers of a layer's planes need; None unless all can read them."""
        if hooked(module) or (type(module) is SparseConv2d and not _fits(module)):
            return None
        border = 0
        for node in self.calls[module]:
            readers = self.readers(node)
            if not readers or node.kwargs:
                return None
            for reader, place in readers:
                layer = self.module(reader)
                if type(layer) is SparseConv2d and place >= 0 and _fits(layer) and not hooked(layer):
                    if place == 0 and max(layer._conv.stride) == 1:
                        border = max(border, *layer._conv.padding)
                elif type(layer) is not Pooled or layer not in self.borders:
                    return None
        return border

    def _fed(self, pool: nn.Module) -> bool:
        return all(self.module(self.source(node.args[0])) in self.borders for node in self.calls[pool])

    def runs(self) -> list[list[fx.Node]]:
        """The calls between which planes pass, run by run, each in the graph's order."""
        of: dict[fx.Node, list[fx.Node]] = {}
        for module in self.borders:
            for node in self.calls[module]:
                for reader, _ in self.readers(node):
                    one, other = of.setdefault(node, [node]), of.setdefault(reader, [reader])
                    if one is not other:
                        one += other
                        of |= dict.fromkeys(other, one)
        return list({id(run): run for run in of.values()}.values())


def _fits(layer: SparseConv2d) -> bool:
    values = layer._parameters.get("values")
    known = values is not None and values.is_cpu and values.dtype in (torch.float32, torch.float64)
    return known and layer.format is _CSR and layer._outer is None and len(layer.shape) == 4


def _decide(model: nn.Module, graph: fx.Graph, run: list[fx.Node], found: _Readers) -> None:
    """Hand on planes within a run if that is faster."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    run = sorted(run, key=order.get)
    layers = list(dict.fromkeys(found.module(node) for node in run))
    borders = {layer: found.borders.get(layer) for layer in layers}
    made = _alone(model, run, found)
    if made is None:
        return
    region, inputs = made

    def call(on: bool) -> None:
        for layer, border in borders.items():
            layer.border = border if on else None
        with torch.no_grad():
            region(*inputs)

    times = measure({"images": lambda: call(False), "planes": lambda: call(True)})
    kept = times["planes"] * NOISE <= times["images"]
    for layer, border in borders.items():
        layer.border = border if kept else None
    first = layers[0]
    if kept and getattr(first, "plan", None) is not None:
        names = ", ".join(layer.layer_name or "a layer" for layer in layers if isinstance(layer, SparseModule))
        note = f"{names} hand on planes, {times['planes']:.1f} us for {times['images']:.1f}"
        first.plan = replace(first.plan, note="; ".join(filter(None, (first.plan.note, note))))


def _alone(model: nn.Module, run: list[fx.Node], found: _Readers) -> tuple[nn.Module, list[torch.Tensor]] | None:
    """A run as a module of its own, and inputs for it; None where a layer was planned for none."""
    graph, inside, inputs = fx.Graph(), {}, []
    for node in run:
        layer, args = found.module(node), []
        for place, argument in enumerate(node.args):
            if not isinstance(argument, fx.Node):
                args.append(argument)
                continue
            source = found.source(argument)
            if source not in inside:
                shape = _shape(layer, place)
                if shape is None:
                    return None
                inside[source] = graph.placeholder(f"x{len(inputs)}")
                values = layer.values
                inputs.append(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(values.dtype))
            args.append(inside[source])
        inside[node] = graph.call_module(node.target, tuple(args))
    graph.output(tuple(inside[node] for node in run if any(reader not in run for reader, _ in found.readers(node))))
    return fx.GraphModule(model, graph), inputs


def _shape(layer: nn.Module, place: int) -> list[int] | None:
    """The shape of a convolution's input, or of what is added to its result."""
    plan = getattr(layer, "plan", None)
    if plan is None or plan.assumed or len(plan.input_shape) != 4:
        return None
    if place == 0:
        return list(plan.input_shape)
    n, _, *size = plan.input_shape
    conv, kernel = layer._conv, layer.shape[2:]
    sides = zip(size, conv.padding, conv.dilation, kernel, conv.stride, strict=True)
    return [n, layer.out_channels, *((m + 2 * p - d * (k - 1) - 1) // s + 1 for m, p, d, k, s in sides)]
