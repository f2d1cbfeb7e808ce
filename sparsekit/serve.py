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

__all__ = ["load"]


def load(path: str | Path, instances: int = 1) -> Callable[..., Any]:
    """The model in a ``.pt2`` file as a function of its inputs; gradients are not recorded.

    A package that AOTInductor compiled (``--to aoti``) opens in milliseconds and calls no Python; as many of
    its ``instances`` may run at once, from threads. A traced graph (``--to pt2``) opens in a second or two,
    most of it torch importing its tracer. Either is a program: open only files you trust.
    Raises FileNotFoundError; ValueError when the file is no such package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Expected a .pt2 file, got no such file")
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: Expected a .pt2 file, got no archive ({error})") from None
    if missing := lacks_cpu():
        warnings.warn(f"{path}: {missing}, so its sparse layers run as dense products", stacklevel=2)
    if any("/data/aotinductor/" in name for name in names):
        # The class behind torch._inductor.aoti_load_package, whose import takes seconds.
        return _Compiled(torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, instances, -1))
    if any("/models/" in name for name in names):
        return torch.no_grad()(torch.export.load(path).module().forward)
    raise ValueError(f"{path}: Expected a .pt2 file that torch.export or AOTInductor wrote, got another archive")


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


def _checked(x: Any, facts: dict[str, Any]) -> Tensor:
    if not isinstance(x, Tensor) or str(x.dtype) != facts["dtype"]:
        raise TypeError(f"Expected an input of {facts['dtype']}, got {getattr(x, 'dtype', type(x).__name__)}")
    wanted = facts["shape"]
    if x.dim() != len(wanted) or list(x.shape[1:]) != wanted[1:] or not len(x):
        raise ValueError(f"Expected an input of shape [N, {', '.join(map(str, wanted[1:]))}], got {list(x.shape)}")
    return x.contiguous(memory_format=torch.channels_last if facts["channels_last"] else torch.contiguous_format)
