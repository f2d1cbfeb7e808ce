"""Puts Triton launchers behind operators, so that torch.compile sees the kernels inside them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import Library

__all__ = ["register"]


def register(lib: Library, name: str, launcher: Callable, twin: Callable, dtypes: tuple[torch.dtype, ...]) -> None:
    """Run operator ``name`` through ``launcher`` on CUDA for ``dtypes``, through ``twin`` for others.

    Under torch.compile the operator is replaced by what its launcher does (as ``torch.library.triton_op``
    arranges), so Inductor compiles the kernels in and packages hold them. With ``TRITON_INTERPRET=1`` the
    launcher serves CPU tensors too.
    """

    def run(*args):
        return (launcher if args[0].dtype in dtypes else twin)(*args)

    lib.impl(name, run, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        lib.impl(name, run, "CPU")

    def decompose(mode, op, types, args, kwargs):
        if args[0].device.type != "cuda" or args[0].dtype not in dtypes or _exporting():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        known = (torch.Tensor, torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)
        if any(not issubclass(kind, known) for kind in types):
            return NotImplemented
        with mode:
            return launcher(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(f"sparsekit::{name}", FunctionalTensorMode, decompose, lib=lib)


def _exporting() -> bool:
    """Whether torch.export wants operators kept whole."""
    with contextlib.suppress(ImportError):
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        return custom_triton_ops_decomposition_disabled()
    return False
