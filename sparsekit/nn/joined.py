"""Blocks in which convolutions add what joins them and apply the activation after that, inside their kernels."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_aggregate

from .base import SparseModule
from .conv import SparseConv2d
from .operations import hooked, inplace, named

__all__ = ["Joined", "join", "separate"]

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_OWN = ("torch.", "sparsekit.nn.")


@dataclass(frozen=True)
class _Result:
    """Stands for what an earlier call gave."""

    name: str


class Joined:
    """What a module's own ``forward`` computes, in fewer calls; it hides that one until ``to_dense``.

    What the module's code reads beside tensors and modules (numbers, flags) is a constant in it.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.inputs: dict[str, tuple] = {}
        self.calls: list[tuple] = []
        last = {argument: node for node in graph.nodes for argument in node.all_input_nodes}
        for node in graph.nodes:
            args, kwargs = (map_aggregate(given, _by_name) for given in (node.args, node.kwargs))
            if node.op == "placeholder":
                self.inputs[node.target] = tuple(node.args)
            elif node.op == "output":
                self.output = args[0]
            else:
                target = node.target.split(".") if node.op in ("call_module", "get_attr") else node.target
                done = [argument.name for argument, reader in last.items() if reader is node]
                self.calls.append((node.op, target, args, kwargs, node.name, done))

    @property
    def __code__(self):  # torch.export asks a forward where it is written
        return type(self.module).forward.__code__

    def __call__(self, *args, **kwargs):
        results = {name: default[0] for name, default in self.inputs.items() if default}
        results |= dict(zip(self.inputs, args, strict=False)) | kwargs
        if results.keys() != self.inputs.keys() or len(args) > len(self.inputs):
            return type(self.module).forward(self.module, *args, **kwargs)  # which knows what is wrong

        def fill(leaf: Any) -> Any:
            return results[leaf.name] if type(leaf) is _Result else leaf

        for op, target, given, options, name, done in self.calls:
            given, options = map_aggregate(given, fill), map_aggregate(options, fill)
            if op == "call_function":
                results[name] = target(*given, **options)
            elif op == "call_method":
                results[name] = getattr(given[0], target)(*given[1:], **options)
            else:
                found = self.module
                for part in target:
                    found = getattr(found, part)
                results[name] = found(*given, **options) if op == "call_module" else found
            for read in done:
                del results[read]
        return map_aggregate(self.output, fill)


def _by_name(leaf: Any) -> Any:
    return _Result(leaf.name) if isinstance(leaf, fx.Node) else leaf


def join(model: nn.Module) -> None:
    """Let the sparse convolutions of ``model`` add what their results are added to and apply the ReLU that follows.

    Rewrites the forward of those modules that torch.fx can trace, the same in every mode. Modules, their names and
    their parameters stay as they are, and so does every bit of a result.
    """
    for block in list(model.modules()):
        if type(block).__module__.startswith(_OWN) or not any(type(m) is SparseConv2d for m in block.modules()):
            continue
        graph = _trace(block)
        if graph is not None and any([_rewrite(block, graph, node) for node in list(graph.nodes)]):
            block.forward = Joined(block, graph)


def separate(module: nn.Module) -> None:
    """Give a module its own forward back."""
    if isinstance(vars(module).get("forward"), Joined):
        del module.forward


class _Tracer(fx.Tracer):
    """Sees a module's own code, and containers in it."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return not isinstance(module, nn.Sequential) or hooked(module)


def _trace(block: nn.Module) -> fx.Graph | None:
    """The graph of a module's forward where that does not depend on a mode."""
    training, found = block.training, []
    try:
        for block.training, grad in itertools.product((not training, training), (True, False)):
            with torch.set_grad_enabled(grad):
                found.append(_Tracer().trace(block))
    except Exception:  # fx raises whatever the traced code raises on its proxies
        return None
    finally:
        block.training = training
    variadic = any(node.op == "placeholder" and node.target.startswith("*") for node in found[0].nodes)
    return found[0] if not variadic and len({str(graph) for graph in found}) == 1 else None


def _rewrite(block: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    """Make a convolution and what follows it one call, if they can be."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    layer = block.get_submodule(node.target)
    if type(layer) is not SparseConv2d or hooked(layer) or layer.activation != "none":
        return False
    run, skip, activation = _passed(block, [node]), None, "none"
    reader = _reader(run[-1])
    if reader is not None and (other := _other(reader, run[-1])) is not None:
        run, skip = _passed(block, [*run, reader]), other
        reader = _reader(run[-1])
    if reader is not None and _is_relu(block, reader):
        run, activation = [*run, reader], "relu"
    if (skip is None and activation == "none") or not _can_wait(block, run):
        return False
    with graph.inserting_before(run[-1]):
        call = graph.call_module(node.target, (node.args[0], skip, activation))
    run[-1].replace_all_uses_with(call)
    for done in reversed(run):
        graph.erase_node(done)
    return True


def _reader(node: fx.Node) -> fx.Node | None:
    """The call that alone reads a result."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _passed(block: nn.Module, run: list[fx.Node]) -> list[fx.Node]:
    """The calls, and the identities that alone read them."""
    while (reader := _reader(run[-1])) is not None and reader.op == "call_module":
        module = block.get_submodule(reader.target)
        if type(module) is not nn.Identity or hooked(module):
            break
        run = [*run, reader]
    return run


def _other(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """What a call adds to ``one``, if that is all it does."""
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS:
        return None
    if node.kwargs or len(node.args) != 2:
        return None
    if node.target in (operator.iadd, "add_") and node.args[0] is not one:
        return None  # it overwrites the other
    others = [argument for argument in node.args if argument is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _is_relu(block: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = block.get_submodule(node.target)
        return type(module) is nn.ReLU and not hooked(module)
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _can_wait(block: nn.Module, run: list[fx.Node]) -> bool:
    """Whether the first of some calls can be made where the last is: nothing between may overwrite its input."""
    node = run[0].next
    while node is not run[-1]:
        if node not in run:
            target = block.get_submodule(node.target) if node.op == "call_module" else node.target
            plain = not isinstance(target, nn.Module) or isinstance(target, SparseModule)
            if not plain and not type(target).__module__.startswith("torch.nn."):
                return False
            if target is operator.setitem or inplace(node, named(node.op, target)[0], target):
                return False
        node = node.next
    return True
