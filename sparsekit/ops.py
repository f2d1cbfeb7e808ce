"""The torch operators ``torch.ops.sparsekit.*``: schemas, shape functions, and who implements them.

Schemas come from :mod:`sparsekit.schemas`, by way of the native library when it is there. Every
operator has the naive implementation of ``kernels/reference.py`` for all devices; a kernel registered
for a device (the native library does so for the CPU) takes precedence over it.
"""

from __future__ import annotations

import json

import torch

from . import _native
from .kernels import reference
from .schemas import SCHEMAS

_lib = torch.library.Library("sparsekit", "FRAGMENT")
_native.load()
for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.sparsekit, _name):
        _lib.define(_name + _schema, tags=())
        if _name == "build_info":
            _lib.impl(_name, lambda: json.dumps({}), "CompositeExplicitAutograd")
    if hasattr(reference, _name):
        _lib.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _fake(function):
    return torch.library.register_fake(f"sparsekit::{function.__name__}", function, lib=_lib)


@_fake
def csr_linear(x, values, crow_indices, col_indices, bias):
    return x.new_empty(x.shape[0], crow_indices.shape[0] - 1)


@_fake
def csr_linear_t(dy, values, t_crow, t_row, t_perm):
    return dy.new_empty(dy.shape[0], t_crow.shape[0] - 1)


@_fake
def csr_sddmm(dy, x, crow_indices, col_indices):
    return dy.new_empty(col_indices.shape[0])


@_fake
def csr_linear_backward(
    dy, x, values, crow_indices, col_indices, t_crow, t_row, t_perm, need_dx, need_dvalues, need_dbias
):
    return (
        dy.new_empty(x.shape if need_dx else 0),
        dy.new_empty(values.shape if need_dvalues else 0),
        dy.new_empty(dy.shape[1] if need_dbias else 0),
    )


@_fake
def csr_conv2d(x, values, crow_indices, col_indices, bias, kernel_size, stride, padding, dilation, groups):
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    return x.new_empty(x.shape[0], crow_indices.shape[0] - 1, *size)


@_fake
def csr_conv2d_t(
    dy, values, t_crow, t_row, t_perm, input_size, kernel_size, stride, padding, dilation, groups
):
    channels = (t_crow.shape[0] - 1) // (kernel_size[0] * kernel_size[1]) * groups
    return dy.new_empty(dy.shape[0], channels, *input_size)


@_fake
def csr_conv2d_sddmm(dy, x, crow_indices, col_indices, kernel_size, stride, padding, dilation, groups):
    return dy.new_empty(col_indices.shape[0])


@_fake
def csr_conv2d_backward(
    dy, x, values, crow_indices, col_indices, t_crow, t_row, t_perm,
    kernel_size, stride, padding, dilation, groups, need_dx, need_dvalues, need_dbias,
):  # fmt: skip
    return (
        dy.new_empty(x.shape if need_dx else 0),
        dy.new_empty(values.shape if need_dvalues else 0),
        dy.new_empty(dy.shape[1] if need_dbias else 0),
    )
