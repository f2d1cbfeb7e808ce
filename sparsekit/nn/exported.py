"""A model's graph as torch.export sees it, its layers called as modules: for models that torch.fx cannot trace."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from .operations import is_layer, is_norm

__all__ = ["exported", "quiet"]

_aten = torch.ops.aten
_PACKETS = {
    _aten.linear: nn.Linear,
    _aten.conv1d: nn.Conv1d,
    _aten.conv2d: nn.Conv2d,
    _aten.batch_norm: nn.modules.batchnorm._BatchNorm,
}
_COUNTER = "num_batches_tracked"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's own account of what goes wrong, which the caller says in a sentence: logs, traces, graphs."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def exported(model: nn.Module, inputs: Any) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """The graph of ``model`` on the path that ``inputs`` take, and what each node gives (tensors without data).

    Linear layers, convolutions and batch norms are ``call_module`` nodes, all else is torch's ``aten`` operators.
    Raises ValueError where a layer is not on that path, and whatever torch.export raises.
    """
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    places = () if keywords else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    with quiet(), torch.no_grad():
        program = torch.export.export(model, places, keywords, strict=False)
        source = program.module(check_guards=False).graph
    graph, got, env = fx.Graph(), {}, {}
    called, counters = set(), set()

    def of(node: fx.Node) -> fx.Node:
        if node not in env:  # a parameter that no layer has read
            env[node] = graph.create_node("get_attr", node.target)
            got[env[node]] = node.meta.get("val")
        return env[node]

    for node in source.nodes:
        if node.op == "get_attr":
            counters |= {node} if node.target.endswith(_COUNTER) else set()
            continue
        if counters & set(node.all_input_nodes):  # how many batches a norm has seen is nobody's business here
            counters.add(node)
            continue
        module, path = _layer(model, node)
        if module is not None:
            called.add(id(module))
            env[node] = graph.create_node("call_module", path, (of(node.args[0]),))
        else:
            env[node] = graph.node_copy(node, of)
        got[env[node]] = node.meta.get("val")
    for name, module in model.named_modules():
        if is_layer(module) and id(module) not in called:
            raise ValueError(f"the inputs do not pass through {name or type(module).__name__}")
    return graph, got


def _layer(model: nn.Module, node: fx.Node) -> tuple[nn.Module | None, str]:
    """The layer whose forward an operator is, and its path; None where it is no layer's."""
    kind = _PACKETS.get(getattr(node.target, "overloadpacket", None)) if node.op == "call_function" else None
    if kind is None:
        return None, ""
    own = [argument for argument in node.args[1:5] if isinstance(argument, fx.Node)]
    if not own or any(argument.op != "get_attr" for argument in own):
        return None, ""
    path = own[0].target.rpartition(".")[0]
    module = model.get_submodule(path)
    if not (isinstance(module, kind) and is_layer(module)):
        return None, ""
    names = ["weight", "bias", *(["running_mean", "running_var"] if is_norm(module) else [])]
    expected = [f"{path}.{name}" if path else name for name in names if getattr(module, name) is not None]
    if [argument.target for argument in own] != expected:
        return None, ""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        ones = (1,) * len(module.kernel_size)
        zeros = (0,) * len(ones)
        padding = module.padding if module.padding_mode == "zeros" else zeros  # others are operators of their own
        given = list(node.args[3:])
        given += (ones, zeros, ones, 1)[len(given) :]
        if [_pair(part) for part in given] != [
            _pair(part) for part in (module.stride, padding, module.dilation, module.groups)
        ]:
            return None, ""
    return module, path


def _pair(part: Any) -> Any:
    return tuple(part) if isinstance(part, list | tuple) else part
