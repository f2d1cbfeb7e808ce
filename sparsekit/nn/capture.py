"""A converted model as one CUDA graph: small networks are then not bound by the launches of their kernels."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .planning import autocast
from .whole import call

__all__ = ["capture", "on_gpu"]

_WARM = 3


def on_gpu(model: nn.Module, example_inputs: Any) -> None:
    """Raise ValueError unless model and inputs are on one GPU, where alone there is something to capture."""
    places = {t.device for t in (*model.parameters(), *model.buffers(), *_tensors(example_inputs))}
    if len(places) != 1 or next(iter(places)).type != "cuda":
        got = ", ".join(sorted(map(str, places))) or "one without tensors"
        raise ValueError(f"Expected a CUDA model and CUDA example_inputs on one device for graph=True, got {got}")


def capture(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Replace the forward of ``model`` by a replay of it on inputs like ``example_inputs``, in eval mode, no gradient.

    After torch's notes on CUDA graphs: warmed up on a side stream, autocast without its cache of weights, inputs
    copied into tensors that stay where they are, outputs copied out of the graph's own memory. The graph reads the
    parameters where they are: changed values are seen. A call raises ValueError where a replay would be another
    function: tensors of other shapes or dtypes, other arguments besides, training mode, a weight that was moved
    (another format, another mask). ``del model.forward`` gives the ordinary forward back, and a copy has it.
    """
    model.eval()
    place = next(t.device for t in _tensors(example_inputs))
    how = inspect.signature(model.forward)
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(place), autocast(place.type)():
        static = pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, example_inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                call(model, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call(model, static)
    model.forward = _Replay(model, how, graph, static, output)
    return model


class _Replay:
    """Copies the inputs in, replays, copies the output out."""

    def __init__(self, model: nn.Module, how: inspect.Signature, graph, static: Any, output: Any) -> None:
        self._model, self._how, self._graph, self._output = model, how, graph, output
        self._weights = [(t, t.data_ptr()) for t in (*model.parameters(), *model.buffers())]
        self._static, self._spec = self._bound(*_arguments(static))

    def __call__(self, *args, **kwargs) -> Any:
        given, spec = self._bound(args, kwargs)
        wanted, got = ([_form(leaf) for leaf in leaves] for leaves in (self._static, given))
        if wanted != got or spec != self._spec:
            raise ValueError(f"Expected inputs as they were captured, {wanted}, got {got}")
        if self._model.training:
            raise ValueError("Expected a captured model in eval mode (model.eval()), got one in training mode")
        if any(tensor.data_ptr() != where for tensor, where in self._weights):
            raise ValueError("Expected weights where they were captured, got moved ones; capture the model anew")
        with torch.no_grad():
            for static, tensor in zip(self._static, given, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(tensor)
            self._graph.replay()
            return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._output)

    def __deepcopy__(self, memo: dict) -> Any:
        twin = memo[id(self._model)]  # a graph reads one model's weights: the copy runs as its class says
        return types.MethodType(type(twin).forward, twin)

    def _bound(self, args: tuple, kwargs: dict) -> tuple[list, Any]:
        """The leaves of the arguments in the order of the signature, however they were passed."""
        bound = self._how.bind(*args, **kwargs)
        bound.apply_defaults()
        return pytree.tree_flatten(dict(bound.arguments))


def _arguments(inputs: Any) -> tuple[tuple, dict]:
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _form(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
