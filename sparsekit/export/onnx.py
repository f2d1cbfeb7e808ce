"""ONNX: the dense graph of a converted model, zeros baked in, for any runtime; checked in onnxruntime.

Packed, a pruned weight is what a function ``sparsekit.Unpack`` makes of its survivors and a bit mask. The file holds
the function's body in ONNX's own operators, so a runtime needs to know nothing of ours.
"""

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
_DOMAIN = "sparsekit"


def save_onnx(model: nn.Module, example_inputs: Any, path: str | Path, sparse: bool = False) -> Path:
    """Write a converted model in eval mode as a dense ONNX graph with a dynamic batch; needs ``sparsekit[onnx]``.

    Runtimes see the pruned weights as zeros and gain no speed from them. ``sparse=True`` stores the survivors and one
    bit per weight, where that is smaller, and the function that unpacks them: onnxruntime does so once, on opening the
    file (a runtime that folds no constants would in every call). A graph of fp32 is run in onnxruntime on
    ``example_inputs``: an output further than 1e-5 of its norm from torch's raises RuntimeError and leaves the old
    file. Raises otherwise as :func:`sparsekit.export.save_pt2`; ImportError without the packages. Returns the path.
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
            onnx.save(_packed(onnx.load(temporary), masks), temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        _check(session, dense, inputs)
    return Path(path)


def _packed(model, masks: dict[str, Tensor]):
    """The model with each masked weight that gets smaller by it unpacked from survivors and bits, bit for bit."""
    from onnx import helper, numpy_helper

    kept, nodes = [], []
    for tensor in model.graph.initializer:
        value, mask = numpy_helper.to_array(tensor), masks.get(tensor.name)
        if mask is None or mask.shape != value.shape or not 0 < mask.sum() < 0.9 * mask.numel():
            kept.append(tensor)
            continue
        alive = mask.numpy(force=True)
        parts = {
            "survivors": value[alive],
            "bits": np.packbits(alive.reshape(-1), bitorder="little"),
            "shape": np.array(value.shape, np.int64),
        }
        kept += [numpy_helper.from_array(part, f"{tensor.name}#{name}") for name, part in parts.items()]
        names = [f"{tensor.name}#{name}" for name in parts]
        nodes.append(helper.make_node("Unpack", names, [tensor.name], domain=_DOMAIN))
    nodes += model.graph.node
    for field, entries in ((model.graph.initializer, kept), (model.graph.node, nodes)):
        entries = list(entries)
        del field[:]
        field.extend(entries)
    model.functions.append(_unpack(list(model.opset_import)))
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return model


def _unpack(opsets):
    """``(survivors, bits uint8, shape int64) -> weight``: bit i says whether i survives, lowest of a byte first."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "powers": np.array([[1, 2, 4, 8, 16, 32, 64, 128]], np.uint8), "one": np.array([1]), "zero": np.array([0]),
        "flat": np.array([-1]), "axis": np.array(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in constants.items()
    ]
    steps = {  # how many survived up to here says which survivor stands here; onnxruntime folds no NonZero
        "column": ("Unsqueeze", "bits", "one"), "each": ("BitwiseAnd", "column", "powers"),
        "row": ("Reshape", "each", "flat"), "count": ("ReduceProd", "shape"), "own": ("Slice", "row", "zero", "count"),
        "alive": ("Cast", "own", TensorProto.BOOL), "ones": ("Cast", "alive", TensorProto.INT64),
        "rank": ("CumSum", "ones", "axis"), "next": ("Sub", "rank", "one"), "place": ("Max", "next", "zero"),
        "spread": ("Gather", "survivors", "place"), "hole": ("CastLike", "zero", "survivors"),
        "whole": ("Where", "alive", "spread", "hole"), "weight": ("Reshape", "whole", "shape"),
    }  # fmt: skip
    for name, (op, *inputs) in steps.items():
        to = {"to": inputs.pop()} if op == "Cast" else {}
        nodes.append(helper.make_node(op, inputs, [name], **to))
    return helper.make_function(_DOMAIN, "Unpack", ["survivors", "bits", "shape"], ["weight"], nodes, opsets)


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
