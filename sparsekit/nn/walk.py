"""The walk over a traced network that finds its units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from . import operations as op
from .exported import exported
from .units import Layer, Read, Units

__all__ = ["Untraceable", "read_units"]


class Untraceable(Exception):
    """No graph of the model can be had; the message says why."""


class Value(NamedTuple):
    """What is known of a tensor: the axis its units lie along, their numbers, and their constants (NaN: varies)."""

    axis: int
    ids: np.ndarray
    const: np.ndarray


def read_units(
    model: nn.Module, masks: Mapping[str, Tensor], inputs: Any, modes: tuple[bool, ...], export: bool = True
) -> Units:
    """The units of a plain model under masks, traced once per mode (True: training).

    ``inputs``: a tensor, or a tuple or dict of arguments. A model that ``torch.fx`` cannot trace is read by
    ``torch.export`` if ``export``, on the path that these inputs take. Raises :class:`Untraceable`.
    """
    units = Units()
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
    flags = {module: module.training for module in model.modules()}
    try:
        for mode in modes:
            model.train(mode)
            graph, got = _graph(model, inputs, units, export)
            _Walk(model, units, masks, names, got, mode).over(graph)
    except Untraceable:
        raise
    except Exception as error:  # of the walk
        raise Untraceable(f"the units of {type(model).__name__} cannot be followed ({_said(error)})") from None
    finally:
        for module, flag in flags.items():
            module.training = flag
    units.close()
    return units


def _graph(model: nn.Module, inputs: Any, units: Units, export: bool) -> tuple[fx.Graph, Mapping[fx.Node, Any]]:
    """A graph of the model in its present mode, and what each node gives: by torch.fx, else by torch.export."""
    training = model.training
    try:
        graph = fx.Tracer().trace(model)
        model.eval()
        shapes = _Shapes(fx.GraphModule(model, graph))
        shapes.run_fake(inputs)
        return graph, shapes.got
    except Exception as error:  # fx raises whatever the traced code raises on its proxies
        first = f"torch.fx cannot trace {type(model).__name__} ({_said(error)})"
    if not export:
        raise Untraceable(first)
    try:
        model.train(training)
        found = exported(model, inputs)
    except Exception as error:
        raise Untraceable(f"{first}, nor can torch.export ({_said(error)})") from None
    units.note = "read by torch.export, on the path that the inputs take"
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


class _Shapes(fx.Interpreter):
    """Runs a graph on tensors without data; ``got`` is what every node gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.got: dict[fx.Node, Any] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        super().__init__(graph)

    def run_fake(self, inputs: Any) -> None:
        holders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        if isinstance(inputs, Mapping):
            args = [inputs[n.target] if n.target in inputs else n.args[0] for n in holders]
        else:
            args = list(inputs) if isinstance(inputs, tuple | list) else [inputs]
        with torch.no_grad(), self.fake:
            self.run(*tree_map(lambda t: self.fake.from_tensor(t) if isinstance(t, Tensor) else t, args))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.got[n] = result
        return result


class _Walk:
    """One pass over a traced graph, from the inputs to the outputs."""

    def __init__(self, model, units: Units, masks, names, got, mode: bool) -> None:
        self.model, self.units, self.masks, self.names, self.got, self.mode = model, units, masks, names, got, mode
        self.values: dict[fx.Node, Value] = {}

    def over(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            value = None
            if node.op == "get_attr":
                self._own(node)
            elif node.op == "output":
                self._fix(node, "an output of the model")
            elif node.op in ("call_module", "call_function", "call_method"):
                value = self._call(node)
            if value is not None:
                self.values[node] = value

    def _own(self, node: fx.Node) -> None:
        """A parameter that is reached past its module: the module cannot change its shape."""
        owner, _, _ = node.target.rpartition(".")
        module = self.model.get_submodule(owner)
        if op.is_layer(module):
            layer = self._layer(module)
            for ids in (layer.outs, layer.ins):
                self.units.fix(ids, f"{node.target} is used outside its layer")

    def _call(self, node: fx.Node) -> Value | None:
        target = self.model.get_submodule(node.target) if node.op == "call_module" else node.target
        if node.op == "call_module" and op.is_layer(target):
            return self._run_layer(node, target)
        name, function = op.named(node.op, target)
        x = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        value = None
        if name in op.BINARY:
            value = self._binary(node, function)
        elif name == "cat":
            value = self._cat(node)
        elif name in op.SIZES and not self._is_tensor(node):
            return None  # a number
        elif x is not None and self._plain(node):
            shape = self.got[node.args[0]].shape
            if name in op.ELEMENTWISE:
                value = Value(x.axis, x.ids, self._constants(function, x.const, node))
            elif name in op.DROPOUT:
                value = self._dropout(node, target, x)
            elif name in op.RESHAPE:
                value = self._reshape(node, name, function, x, shape)
            elif (place := op.spatial(name, target, node, shape, x.axis)) is not None:
                axis, keeps = place
                value = Value(axis, x.ids, np.where((x.const == 0) | keeps(x.const), x.const, np.nan))
            if value is not None and op.inplace(node, name, target):
                self.values[node.args[0]] = value
        if value is None:
            self._fix(node, f"what {_words(node, target)} does with units is not known")
        return value

    def _plain(self, node: fx.Node) -> bool:
        """Whether one tensor alone goes in and one comes out."""
        return isinstance(self.got[node], Tensor) and sum(map(self._is_tensor, node.all_input_nodes)) == 1

    def _is_tensor(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and isinstance(self.got[node], Tensor)

    def _fix(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            if source in self.values:
                self.units.fix(self.values[source].ids, reason)

    def _layer(self, module: nn.Module) -> Layer:
        units = self.units
        if id(module) not in units.layers:
            name = self.names[id(module)]
            rows, columns = op.extents(module)
            outs = units.new(rows)
            layer = Layer(name, module, outs, outs if op.is_norm(module) else units.new(columns))
            if not op.is_norm(module):
                weight = module.weight.detach().double().flatten(2) if module.weight.dim() > 2 else (
                    module.weight.detach().double().unsqueeze(2)
                )  # fmt: skip
                key = f"{name}.weight" if name else "weight"
                mask = self.masks.get(key, torch.ones_like(module.weight, dtype=torch.bool)).cpu()
                shape = (layer.groups, rows // layer.groups, -1)
                layer.alive = mask.reshape(weight.shape).any(2).view(shape).numpy()
                layer.taps = (weight.cpu() * mask.reshape(weight.shape)).sum(2).view(shape).numpy()
            if op.hooked(module):
                for ids in (layer.outs, layer.ins):
                    units.fix(ids, "hooks on the module")
            units.layers[id(module)] = layer
        return units.layers[id(module)]

    def _run_layer(self, node: fx.Node, module: nn.Module) -> Value | None:
        layer, rank = self._layer(module), self.got[node].dim()
        source = node.args[0] if node.args else node.kwargs["input"]
        axis, x = op.unit_axis(module, rank), self.values.get(source)
        if x is None or x.axis != axis or len(x.ids) != len(layer.ins):
            self.units.fix(layer.ins, f"{layer.name} reads the model's input, or what is not known as units")
            self._fix(node, f"{layer.name} reads units along another axis")
            const = np.full(len(layer.ins), np.nan)
        else:
            self.units.join(layer.ins, x.ids)
            const = x.const
        if op.is_norm(module):
            out = op.norm_constants(module, const, self.mode)
        else:
            self.units.reads.append(Read(layer, const))
            out = _product_constants(layer, const)
        return Value(axis, layer.outs, out)

    def _constants(self, function: Callable, const: np.ndarray, node: fx.Node) -> np.ndarray:
        """An elementwise function of the constants; it is the node's own, on float64."""
        rest = node.args[1:] if node.op != "call_module" else ()
        with torch.no_grad():
            result = function(torch.from_numpy(const.copy()), *self._given(rest), **self._given(node.kwargs))
        return np.where(np.isnan(const), np.nan, result.double().cpu().numpy())

    def _given(self, args: Any) -> Any:
        return fx.node.map_arg(args, lambda n: self.got[n])

    def _dropout(self, node: fx.Node, target: Any, x: Value) -> Value:
        active = self.mode if node.op == "call_module" else op.argument(node, 2, "training", True)
        return Value(x.axis, x.ids, np.where(x.const == 0, 0.0, np.nan) if active else x.const)

    def _reshape(self, node, name: str, function: Callable, x: Value, shape: torch.Size) -> Value | None:
        """Follow the units through a view by sending their positions through it."""
        line = [-1 if axis == x.axis else 1 for axis in range(len(shape))]
        positions = torch.arange(len(x.ids), dtype=torch.int32).view(line).expand(shape)
        rest = node.args[1:] if node.op != "call_module" else ()
        moved = function(positions, *self._given(rest), **self._given(node.kwargs))
        found = op.only_axis(moved, len(x.ids))
        if found is None:
            return None
        axis, order = found
        if name in op.SIZED:
            sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
            sizes = sizes or op.argument(node, 1, "shape", None)
            if sizes is None or (isinstance(sizes[axis], int) and sizes[axis] != -1):
                return None  # a size written out in the code cannot follow the units
        return Value(axis, x.ids[order], x.const[order])

    def _binary(self, node: fx.Node, function: Callable) -> Value | None:
        if node.kwargs.keys() - {"alpha", "rounding_mode"} or len(node.args) < 2:
            return None
        both = node.args[:2]
        known = [self.values.get(n) if isinstance(n, fx.Node) else None for n in both]
        rank = self.got[node].dim()
        if None in known:
            x = known[0] or known[1]
            other = both[1] if known[0] else both[0]
            if x is None:
                return None
            other = self.got[other] if isinstance(other, fx.Node) else other
            from_end = x.axis - self.got[both[0] if known[0] else both[1]].dim()
            if not isinstance(other, Tensor):
                args = (torch.from_numpy(x.const.copy()), other)
                result = function(*(args if known[0] else args[::-1]), **self._given(node.kwargs))
                const = result.double().cpu().numpy()
            elif -from_end > other.dim() or other.shape[from_end] == 1:
                const = np.full(len(x.ids), np.nan)
            else:
                return None
            value = Value(rank + from_end, x.ids, const)
        else:
            a, b = known
            ends = [v.axis - self.got[n].dim() for v, n in zip(known, both, strict=True)]
            if ends[0] != ends[1] or len(a.ids) != len(b.ids):
                return None
            self.units.join(a.ids, b.ids)
            args = (torch.from_numpy(a.const.copy()), torch.from_numpy(b.const.copy()))
            value = Value(rank + ends[0], a.ids, function(*args, **self._given(node.kwargs)).double().numpy())
        if op.inplace(node, "", None) and isinstance(both[0], fx.Node):
            self.values[both[0]] = value
        return value

    def _cat(self, node: fx.Node) -> Value | None:
        parts, rank = op.argument(node, 0, "tensors", ()), self.got[node].dim()
        axis = op.argument(node, 1, "dim", 0)
        known = [self.values.get(n) for n in parts]
        given = [v for v in known if v is not None]
        if not given or not isinstance(axis, int) or len({v.axis for v in given}) != 1:
            return None
        axis, own = axis % rank, given[0].axis
        if axis == own:
            ids, const = [], []
            for n, v in zip(parts, known, strict=True):
                if v is None:  # a part without units keeps its place
                    fresh = self.units.new(self.got[n].shape[axis])
                    self.units.fix(fresh, f"{n.name} is joined to it and is not known as units")
                    v = Value(axis, fresh, np.full(len(fresh), np.nan))
                ids.append(v.ids)
                const.append(v.const)
            return Value(own, np.concatenate(ids), np.concatenate(const))
        if len(given) != len(parts):
            return None
        for v in given[1:]:
            self.units.join(given[0].ids, v.ids)
        same = np.all([v.const == given[0].const for v in given], axis=0)
        return Value(own, given[0].ids, np.where(same, given[0].const, np.nan))


def _product_constants(layer: Layer, const: np.ndarray) -> np.ndarray:
    """The rows of a linear or convolution layer that no varying column reaches, as constants."""
    groups = layer.groups
    columns = const.reshape(groups, 1, -1)
    known = (columns == 0) if layer.bordered else ~np.isnan(columns)
    varies = (layer.alive & ~known).any(2).reshape(-1)
    value = (layer.taps * np.where(known, columns, 0.0)).sum(2).reshape(-1)
    if layer.module.bias is not None:
        value = value + layer.module.bias.detach().double().cpu().numpy()
    return np.where(varies, np.nan, value)


def _words(node: fx.Node, target: Any) -> str:
    if isinstance(target, nn.Module):
        return f"{type(target).__name__} ({node.target})"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
