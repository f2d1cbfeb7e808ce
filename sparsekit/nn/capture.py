"""A converted model as one CUDA graph: small networks are then not bound by the launches of their kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .whole import call

__all__ = ["capture", "on_gpu"]

_WARM = 3


def on_gpu(model: nn.Module, example_inputs: Any) -> None:
    """Raise ValueError unless model and inputs are on a GPU, where alone there is something to capture."""
    places = {t.device.type for t in (*model.parameters(), *model.buffers(), *_tensors(example_inputs))}
    if places != {"cuda"}:
        got = ", ".join(sorted(places)) or "one without tensors"
        raise ValueError(f"Expected a CUDA model and CUDA example_inputs for graph=True, got {got}")


def capture(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Replace the forward of ``model`` by a replay of it on inputs like ``example_inputs``, in eval mode, no gradient.

    The captured graph reads the parameters where they are: changed values are seen, moved ones are not. The weights
    keep their names; ``del model.forward`` gives the ordinary forward back. A call with tensors of other shapes or
    dtypes raises ValueError.
    """
    model.eval()
    static = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, example_inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(_WARM):
            call(model, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = call(model, static)
    model.forward = _Replay(graph, static, output)
    return model


class _Replay:
    """Copies the inputs in, replays, copies the output out."""

    def __init__(self, graph: torch.cuda.CUDAGraph, static: Any, output: Any) -> None:
        self._graph, self._static, self._output = graph, _tensors(static), output

    def __call__(self, *args, **kwargs) -> Any:
        given = _tensors((args, kwargs))
        wanted, got = ([(tuple(t.shape), t.dtype) for t in tensors] for tensors in (self._static, given))
        if wanted != got:
            raise ValueError(f"Expected inputs as they were captured, {wanted}, got {got}")
        for static, tensor in zip(self._static, given, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._output)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
