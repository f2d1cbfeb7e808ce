"""Triton's interpreter made trustworthy: what tests of Triton kernels share. Not collected by pytest.

``TRITON_INTERPRET=1``, set before triton is imported, runs kernels on CPU tensors. :func:`patch` mends what
is silently wrong or merely absent there; each part is left out where the installed Triton lacks the function
it mends, and changes nothing where a newer Triton does the right thing itself:

- ``tl.dot`` of bf16 multiplies the bits as integers (Triton 3.6 to 3.9): operands become fp32 first.
- fp32 to bf16 truncates, and turns some NaN into Inf: rounded to nearest even here, as a GPU does.
- Arithmetic on bf16 works on the bits: raises TypeError here; kernels compute in fp32.
- ``range()`` over a runtime bound breaks under Triton 3.6 with numpy >= 2.4.
- Addresses outside the tensors given to the kernel are read and written unnoticed: IndexError here.
- A masked load without ``other`` yields 0, on a GPU whatever the register held: NaN (or a large index) here.
- numpy's warnings about Inf and NaN, errors under pytest, are off inside kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels in this process run in the interpreter."""

DEVICE = "cuda" if torch.cuda.is_available() and not ACTIVE else "cpu"
"""Where tensors of kernel tests live."""

_JUNK = 0x5555


def runs_kernels(test):
    """Mark a test that launches kernels: on a GPU, or anywhere under the interpreter."""
    return test if ACTIVE else pytest.mark.gpu(test)


def patch() -> None:
    """Mend the interpreter of this process; does nothing unless :data:`ACTIVE`, nor a second time."""
    if not ACTIVE:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "_mended", False):
        return
    interpreter._mended = True
    builder = interpreter.InterpreterBuilder
    _bf16(interpreter, builder, tl)
    _bounds(interpreter, builder, tl)

    if hasattr(interpreter, "_patch_lang_tensor"):
        before = interpreter._patch_lang_tensor

        def tensor_methods(tensor, *scope):
            before(tensor, *scope)
            tensor.__index__ = lambda self: int(np.asarray(self.handle.data).item())

        interpreter._patch_lang_tensor = tensor_methods

    run = interpreter.GridExecutor.__call__

    def quiet(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = quiet


def _bf16(interpreter, builder, tl) -> None:
    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype.itemsize != 2:
            return handle
        wide = (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)

    if hasattr(interpreter, "_convert_float"):
        convert = interpreter._convert_float

        def rounded(data, source, target, mode):
            if source != tl.float32 or target != tl.bfloat16:
                return convert(data, source, target, mode)
            bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
            near = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
            return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), near).reshape(np.shape(data))

        interpreter._convert_float = rounded

    binary = builder.binary_op

    def checked(self, lhs, rhs, op):
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError(f"Expected fp32 operands of {op.__name__}, got bf16, which the interpreter adds as bits")
        return binary(self, lhs, rhs, op)

    builder.binary_op = checked


def _bounds(interpreter, builder, tl) -> None:
    extents = {"start": np.zeros(0, np.int64), "end": np.zeros(0, np.int64)}
    to_host = interpreter.GridExecutor._init_args_hst

    def recorded(self, args, kwargs):
        hosts = to_host(self, args, kwargs)
        tensors = [getattr(arg, "base", arg) for arg in (*hosts[0], *hosts[1].values())]
        spans = sorted(_span(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        extents["start"] = np.array([start for start, _ in spans], np.int64)
        extents["end"] = np.maximum.accumulate(np.array([end for _, end in spans], np.int64))
        return hosts

    interpreter.GridExecutor._init_args_hst = recorded

    def check(pointers, mask, what):
        address = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if not address.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.searchsorted(extents["start"], address, "right") - 1
        outside = (at < 0) | (address + size > extents["end"][at])
        if outside.any():
            raise IndexError(f"Expected {what}s inside the kernel's tensors, got {int(outside.sum())} outside")

    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, other, *rest):
        check(pointers, mask, "read")
        if other is None and not mask.data.all():
            kind = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            junk = np.nan if dtype.kind == "f" else 0x7FC0 if kind == tl.bfloat16 else _JUNK
            other = interpreter.TensorHandle(np.full(pointers.data.shape, junk).astype(dtype), kind)
        return load(self, pointers, mask, other, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask, "write")
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one past its last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)


def poison(monkeypatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN, so that an output never written is seen."""

    def filled(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def rerun(file: str, least: int) -> None:
    """Run a test file in a process of its own under the interpreter: ``least`` tests pass, none fails or is skipped.

    The file defines the test that calls this only where not :data:`ACTIVE`.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) >= least, f"Expected at least {least} tests to pass, got: {summary}"
    assert "skipped" not in summary, f"Expected none skipped, got: {summary}"
