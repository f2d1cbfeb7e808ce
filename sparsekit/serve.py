"""Serving: opens what :mod:`sparsekit.export` compiled or traced. Imports the operators and nothing that trains."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import ops as _ops  # noqa: F401 - the packages call the operators
from ._native import lacks_cpu
from .traced import Traced, read

__all__ = ["load"]


def load(path: str | Path, instances: int = 1) -> Callable[..., Any]:
    """The model in a ``.pt2`` file as a function of its inputs; gradients are not recorded.

    Both kinds open in less than a tenth of a second. A package that AOTInductor compiled (``--to aoti``) is machine
    code and calls no Python; as many of its ``instances`` may run at once, from threads. A traced graph (``--to pt2``)
    runs operator by operator, those of torch and sparsekit and no others; one that holds regions (``torch.cond``,
    autocast) is refused, and left to ``torch.export.load``. Nothing is unpickled, but the indices of sparse layers are
    believed: open only files you trust.
    Raises FileNotFoundError; ValueError when the file is no such package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Expected a .pt2 file, got no such file")
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            compiled = any("/data/aotinductor/" in name for name in names)
            traced = not compiled and any("/models/" in name for name in names)
            graph = read(file) if traced else None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: Expected a .pt2 file, got no archive ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: Expected a graph of torch's and sparsekit's operators, got {error}") from None
    if missing := lacks_cpu():
        warnings.warn(f"{path}: {missing}, so its sparse layers run as dense products", stacklevel=2)
    if graph is not None:
        return _Graph(graph)
    if not compiled:
        raise ValueError(f"{path}: Expected a .pt2 file that torch.export or AOTInductor wrote, got another archive")
    # The class behind torch._inductor.aoti_load_package, whose import takes seconds.
    return _Compiled(torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, instances, -1))


class _Compiled:
    """A compiled package, called like its model; it checks the inputs, which compiled code does not."""

    def __init__(self, package) -> None:
        self._package = package
        self._inputs = json.loads(package.get_metadata().get("inputs", "null"))
        self._outputs = pytree.treespec_loads(package.get_call_spec()[1])
        if not isinstance(self._inputs, list):
            raise ValueError("Expected a package that sparsekit compiled, got one without the shapes of its inputs")

    def __call__(self, *inputs: Any) -> Any:
        """Inputs as at export, any batch of at least 1; raises ValueError or TypeError where they are not."""
        if len(inputs) != len(self._inputs):
            raise ValueError(f"Expected {len(self._inputs)} inputs as at export, got {len(inputs)}")
        pairs = zip(inputs, self._inputs, strict=True)
        flat = [_checked(x, facts) for x, facts in pairs if facts is not None]
        return pytree.tree_unflatten(self._package.boxed_run(flat), self._outputs)


class _Graph:
    """A traced graph, called like its model."""

    def __init__(self, graph: Traced) -> None:
        self._graph, self._facts = graph, [facts for _, facts in graph.inputs]

    def __call__(self, *inputs: Any) -> Any:
        """Inputs as at export, any batch of at least 1; raises ValueError or TypeError where they are not."""
        plain = all(isinstance(x, Tensor) for x in inputs)
        for x, facts in zip(inputs if plain else pytree.tree_leaves(inputs), self._facts, strict=False):
            if facts is not None:
                _check(x, facts)
        return self._graph.run(*inputs)


def _checked(x: Any, facts: dict[str, Any]) -> Tensor:
    _check(x, facts)
    return x.contiguous(memory_format=torch.channels_last if facts["channels_last"] else torch.contiguous_format)


def _check(x: Any, facts: dict[str, Any]) -> None:
    if not isinstance(x, Tensor) or str(x.dtype) != facts["dtype"]:
        raise TypeError(f"Expected an input of {facts['dtype']}, got {getattr(x, 'dtype', type(x).__name__)}")
    wanted = facts["shape"]
    fits = x.dim() == len(wanted) and all(w in (None, n) for w, n in zip(wanted, x.shape, strict=True))
    if not fits or 0 in x.shape[:1]:
        text = ", ".join("N" if extent is None else str(extent) for extent in wanted)
        raise ValueError(f"Expected an input of shape [{text}], got {list(x.shape)}")
