"""``.pt2``: the graph of a sparse model by torch.export, as it is or compiled by AOTInductor.

Both are for serving: :func:`sparsekit.serve.load` opens either without the code that trains, and
``examples/serve_cpp`` runs the compiled one without Python.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils._pytree import tree_map_only

from ..files import PARTIAL
from ..nn import SparseModule

__all__ = ["beside", "exported", "save_aoti", "save_pt2"]


def save_pt2(model: nn.Module, example_inputs: Any, path: str | Path) -> Path:
    """Write the graph of a converted model in eval mode, with its sparse operators, to a ``.pt2`` file.

    ``example_inputs`` is a tensor or a tuple of them; the first axis of those that share the first one's size is the
    batch, which may be of any size later. Formats are those the model has; :func:`sparsekit.fuse` it
    first for speed. Any machine with sparsekit runs the file, one without their kernels slower.
    Raises ValueError for a model in training mode or one that torch.export cannot trace. Returns the path.
    """
    program = exported(model, example_inputs)
    # The example goes into the file, where its shape says enough.
    program.example_inputs = tree_map_only(Tensor, lambda x: x.new_zeros(()).expand(x.shape), program.example_inputs)
    with beside(path, ".pt2") as temporary:
        torch.export.save(program, temporary)
    return Path(path)


def save_aoti(model: nn.Module, example_inputs: Any, path: str | Path) -> Path:
    """:func:`save_pt2`, compiled ahead of time for this kind of machine by AOTInductor (needs a C++ compiler).

    The package holds machine code for the processor and torch version it was made with; it opens in
    milliseconds. Raises as :func:`save_pt2`, and RuntimeError where the compiler fails.
    """
    # Sizes that are known are treated as if they were not, or the code's own checks would refuse a batch of one.
    with symbolic_shapes.patch(backed_size_oblivious=True):
        return _compiled(exported(model, example_inputs), path)


def _compiled(program: torch.export.ExportedProgram, path: str | Path) -> Path:
    # Compiled code trusts its inputs; serve.load reads this and checks them.
    config = {"aot_inductor.metadata": {"inputs": json.dumps([_facts(x) for x in program.example_inputs[0]])}}
    with beside(path, ".pt2") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's compiler about its own code
        warnings.simplefilter("ignore", DeprecationWarning)
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=config)
    return Path(path)


def exported(model: nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    """The program of ``model`` for a batch of any size; raises ValueError as :func:`save_pt2`."""
    if model.training:
        raise ValueError("Expected a model in eval mode (model.eval()), got one in training mode")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    first = next((x for x in inputs if isinstance(x, Tensor) and x.dim()), None)
    if first is None:
        raise ValueError(f"Expected inputs with a batch axis, got {type(example_inputs).__name__}")
    batched = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == len(first) for x in inputs]
    inputs = tuple(_example(x, b) for x, b in zip(inputs, batched, strict=True))
    shapes = tuple({0: torch.export.Dim("batch", min=1)} if b else None for b in batched)
    model = _lean(model)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.export.export(model, inputs, dynamic_shapes=(shapes,) if _variadic(model) else shapes)
    except Exception as error:  # whatever tracing the model's own code raises
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"{type(model).__name__}: Expected a model that torch.export traces, got: {why}") from error


def _example(x: Any, batched: bool) -> Any:
    """An input as the graph will know it: dense, and of a batch of 2 where torch.export would take 1 for a constant."""
    if not isinstance(x, Tensor):
        return x
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    x = x.detach().new_zeros(2, *x.shape[1:]) if batched and len(x) < 2 else x.detach()
    return x.contiguous(memory_format=layout)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _facts(x: Any) -> dict[str, Any] | None:
    if not isinstance(x, Tensor):
        return None
    return {"dtype": str(x.dtype), "shape": [None, *x.shape[1:]], "channels_last": _channels_last(x)}


def _variadic(model: nn.Module) -> bool:
    """Whether forward takes ``*args``, which torch.export wants as one entry."""
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


def _lean(model: nn.Module) -> nn.Module:
    """A copy without the index tensors that only the backward pass reads."""
    model = copy.deepcopy(model).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, SparseModule):
            fmt, saved = module.format, module._saved_index()
            kept = saved | fmt.prepare(saved, torch.Size(module.shape))
            for name in fmt.derived_names:
                module._buffers[name] = kept.get(name)
    return model


@contextmanager
def beside(path: str | Path, suffix: str) -> Iterator[Path]:
    """A file in a hidden folder beside ``path``, which it replaces when the block ends well."""
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{path}: Expected a file name that ends in {suffix}, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: Expected a file in an existing directory, got no {path.parent}")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent) as folder:
        yield Path(folder, path.name)
        for file in Path(folder).iterdir():  # the model and, of large ones, weights in files of their own
            os.replace(file, path.with_name(file.name))
