"""Puts Triton launchers behind operators, so that torch.compile sees the kernels inside them."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.library import Library

__all__ = ["register"]


def register(lib: Library, name: str, launcher: Callable, twin: Callable, takes: Callable[..., bool]) -> None:
    """Run operator ``name`` on CUDA through ``launcher`` where ``takes(name, *args)``, else through ``twin``.

    Under torch.compile the operator is replaced by what its launcher does (as ``torch.library.triton_op``
    arranges), so Inductor compiles the kernels in and packages hold them. With ``TRITON_INTERPRET=1`` the
    launcher serves CPU tensors too.
    """

    def run(*args):
        first = args[0]
        kernel = launcher if takes(name, *args) else twin
        if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # Triton launches on the current device, whatever it is given
                return kernel(*args)
        return kernel(*args)

    lib.impl(name, run, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        with warnings.catch_warnings(action="ignore"):  # torch announces that the native kernel gives way
            lib.impl(name, run, "CPU", allow_override=True)

    def decompose(mode, op, types, args, kwargs):
        if args[0].device.type != "cuda" or not takes(name, *args) or _exporting():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        known = (torch.Tensor, torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)
        if any(not issubclass(kind, known) for kind in types):
            return NotImplemented
        with mode:
            return launcher(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(f"sparsekit::{name}", FunctionalTensorMode, decompose, lib=lib)
    _name_kernels(f"sparsekit::{name}", launcher)


def _name_kernels(name: str, launcher: Callable) -> None:
    """Make the kernels' sources part of torch's key of a compiled graph on disk: a changed kernel is compiled anew."""
    with contextlib.suppress(ImportError, AttributeError):
        from torch._library.triton import triton_ops_to_kernels
        from triton.runtime import JITFunction

        module = sys.modules[launcher.__module__]
        seen = [module, *(part for part in vars(module).values() if inspect.ismodule(part))]
        own = [part for part in seen if part.__name__.startswith(module.__package__)]
        triton_ops_to_kernels[name] = [k for part in own for k in vars(part).values() if isinstance(k, JITFunction)]


def _exporting() -> bool:
    """Whether torch.export wants operators kept whole."""
    with contextlib.suppress(ImportError):
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        return custom_triton_ops_decomposition_disabled()
    return False
