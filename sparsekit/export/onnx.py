"""ONNX: the dense graph of a converted model, zeros baked in, for any runtime; checked in onnxruntime."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn import masks_of, to_dense
from .graph import beside, exported

__all__ = ["save_onnx"]

_ERROR = 1e-5


def save_onnx(model: nn.Module, example_inputs: Any, path: str | Path, sparse: bool = False) -> Path:
    """Write a converted model in eval mode as a dense ONNX graph with a dynamic batch; needs ``sparsekit[onnx]``.

    Runtimes see the pruned weights as zeros and gain no speed from them. ``sparse=True`` stores pruned weights
    as ``sparse_initializer`` (values and int64 positions) where that is smaller, below a density of about
    1/3 in fp32; runtimes make them dense on loading, and few but onnxruntime take them. A graph of fp32 is run
    in onnxruntime on ``example_inputs``: an output further than 1e-5 of its norm from torch's raises
    RuntimeError and leaves the old file. Raises otherwise as :func:`sparsekit.export.save_pt2`; ImportError
    without the packages. Returns the path.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter imports it
    except ImportError as error:
        raise ImportError(f"Expected onnx, onnxscript, onnxruntime: pip install 'sparsekit[onnx]' ({error})") from None
    masks, dense = masks_of(model), to_dense(model)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    program = exported(dense, inputs)
    with beside(path, ".onnx") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own code
        logging.disable(logging.WARNING)
        try:
            torch.onnx.export(program, dynamo=True, verbose=False).save(temporary)
        finally:
            logging.disable(logging.NOTSET)
        if sparse:
            onnx.save(_with_sparse(onnx.load(temporary), masks), temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        _check(session, dense, inputs)
    return Path(path)


def _with_sparse(graph, masks: dict[str, Tensor]):
    """The model with each masked weight that gets smaller by it as a sparse initialiser; bits of survivors kept."""
    import onnx

    kept = []
    for tensor in graph.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        alive = np.flatnonzero(value) if tensor.name in masks else None
        if alive is None or len(alive) * (value.itemsize + 8) >= value.nbytes:
            kept.append(tensor)
            continue
        survivors = onnx.numpy_helper.from_array(value.reshape(-1)[alive], tensor.name)
        graph.graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(survivors, onnx.numpy_helper.from_array(alive.astype(np.int64)), value.shape)
        )
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    return graph


def _check(session, dense: nn.Module, inputs: tuple) -> None:
    """Raise RuntimeError where onnxruntime and torch differ; other dtypes than fp32 round too much to tell."""
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(dense(*inputs))
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    feeds = {entry.name: x.numpy(force=True) for entry, x in zip(session.get_inputs(), tensors, strict=True)}
    for got, want in zip(session.run(None, feeds), wanted, strict=True):
        error = np.linalg.norm(got - want.numpy(force=True)) / max(float(want.norm()), 1e-30)
        if want.dtype == torch.float32 and not error <= _ERROR:
            raise RuntimeError(f"Expected onnxruntime within {_ERROR} of torch, got {error:.1e}")
