"""The torch operators ``torch.ops.sparsekit.*``: schemas, shape functions, and who implements them.

Schemas come from :mod:`sparsekit.schemas`, by way of the native library when it is there. Every
operator has the naive implementation of a ``reference.py`` for all devices; a kernel registered for a
device takes precedence over it: the native library's for the CPU, Triton's for CUDA.
"""

from __future__ import annotations

import importlib.util
import json
import os

import torch

from . import _native
from .kernels import bsr, panel, reference
from .kernels.bitmap import reference as bitmap_reference
from .kernels.blocks import reference as blocks_reference
from .kernels.csr import planes
from .kernels.lanes import reference as lanes_reference
from .kernels.nm import cuda as nm
from .kernels.nm import reference as nm_reference
from .schemas import SCHEMAS

_BLOCKED = {f"{fmt.name}_{verb}": verb for fmt in (bsr.FORMAT, panel.FORMAT) for verb in fmt.verbs}
"""The operators of the formats of dense blocks share shapes and twins, verb by verb."""

TWINS = {name: getattr(reference, name) for name in SCHEMAS if name.startswith("csr_") and hasattr(reference, name)}
TWINS |= {name: getattr(blocks_reference, verb) for name, verb in _BLOCKED.items()}
TWINS |= {name: getattr(planes, name) for name in ("csr_conv2d_planes", "max_pool2d_planes")}
TWINS |= {"max_pool2d": reference.max_pool2d, "bitmap_linear": bitmap_reference.bitmap_linear}
TWINS |= {"lanes_linear": lanes_reference.lanes_linear}
TWINS |= {"zero_pruned_": reference.clear_pruned_, "dense_sddmm": reference.dense_sddmm}
TWINS |= {name: getattr(nm_reference, name) for name in ("nm_linear", "nm_linear_t", "nm_sddmm")}
"""The naive implementation of every operator, by name."""

_lib = torch.library.Library("sparsekit", "FRAGMENT")
_native.load()
for _name, _schema in SCHEMAS.items():
    if not hasattr(torch.ops.sparsekit, _name):
        _lib.define(_name + _schema, tags=())
        if _name == "build_info":
            _lib.impl(_name, lambda: json.dumps({}), "CompositeExplicitAutograd")
    if _name in TWINS:
        _lib.impl(_name, TWINS[_name], "CompositeExplicitAutograd")

for _name, _kernel in nm.KERNELS.items():  # torch's own binding does the work: no library of ours is needed
    _lib.impl(_name, _kernel, "CUDA")


def register_triton() -> None:
    """Put the Triton kernels behind the operators on CUDA; done at import where torch has CUDA and triton is there."""
    from . import _triton
    from .kernels.bsr import cuda

    for name, launcher in cuda.LAUNCHERS.items():
        _triton.register(_lib, name, launcher, TWINS[name], cuda.takes)


if importlib.util.find_spec("triton") and (torch.version.cuda or os.environ.get("TRITON_INTERPRET") == "1"):
    register_triton()


def _fake(function):
    return torch.library.register_fake(f"sparsekit::{function.__name__}", function, lib=_lib)


@_fake
def csr_linear(x, values, crow_indices, col_indices, bias, code_key=None, activation="none"):
    return x.new_empty(x.shape[0], crow_indices.shape[0] - 1)


@_fake
def csr_chain(x, values, crow_indices, col_indices, biases, code_keys, activations):
    return x.new_empty(x.shape[0], crow_indices[-1].shape[0] - 1)


@_fake
def csr_linear_t(dy, values, t_crow, t_row, t_perm):
    return dy.new_empty(dy.shape[0], t_crow.shape[0] - 1)


@_fake
def csr_sddmm(dy, x, crow_indices, col_indices):
    return dy.new_empty(col_indices.shape[0])


@_fake
def csr_linear_backward(
    dy, x, values, crow_indices, col_indices, t_crow, t_row, t_perm, need_dx, need_dvalues, need_dbias, code_key=None
):
    return (
        dy.new_empty(x.shape if need_dx else 0),
        dy.new_empty(values.shape if need_dvalues else 0),
        dy.new_empty(dy.shape[1] if need_dbias else 0),
    )


def _image(like, *size):
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=reference.image_format(like))


def _output_size(x, kernel_size, stride, padding, dilation):
    return [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]


@_fake
def csr_conv2d(
    x, values, crow_indices, col_indices, bias, kernel_size, stride, padding, dilation, groups,
    code_key=None, activation="none", skip=None,
):  # fmt: skip
    size = _output_size(x, kernel_size, stride, padding, dilation)
    return _image(x, x.shape[0], crow_indices.shape[0] - 1, *size)


@_fake
def csr_conv2d_planes(
    x, x_size, values, crow_indices, col_indices, bias, kernel_size, stride, padding, dilation, groups,
    code_key, activation, skip, skip_size, lanes, border,
):  # fmt: skip
    image = x.new_empty(x_size[0], 0, *x_size[1:3], device="meta") if x_size else x
    size = [image.shape[0], *_output_size(image, kernel_size, stride, padding, dilation)]
    channels = crow_indices.shape[0] - 1
    return _planes(x, [*size, border], channels, lanes) if border >= 0 else x.new_empty(size[0], channels, *size[1:])


def _planes(like, size, channels, lanes):
    return like.new_empty(-(-size[0] // lanes), channels, planes.positions(size, lanes, like.dtype), lanes)


@_fake
def csr_conv2d_t(
    dy, values, t_crow, t_row, t_perm, input_size, kernel_size, stride, padding, dilation, groups
):
    channels = (t_crow.shape[0] - 1) // (kernel_size[0] * kernel_size[1]) * groups
    return _image(dy, dy.shape[0], channels, *input_size)


@_fake
def csr_conv2d_sddmm(dy, x, crow_indices, col_indices, kernel_size, stride, padding, dilation, groups):
    return dy.new_empty(col_indices.shape[0])


@_fake
def csr_conv2d_backward(
    dy, x, values, crow_indices, col_indices, t_crow, t_row, t_perm,
    kernel_size, stride, padding, dilation, groups, need_dx, need_dvalues, need_dbias, code_key=None,
):  # fmt: skip
    return (
        _image(dy, *x.shape) if need_dx else dy.new_empty(0),
        dy.new_empty(values.shape if need_dvalues else 0),
        dy.new_empty(dy.shape[1] if need_dbias else 0),
    )


@_fake
def max_pool2d(x, kernel_size, stride, padding):
    return x.new_empty(*x.shape[:2], *_output_size(x, kernel_size, stride, padding, (1, 1)))


@_fake
def max_pool2d_planes(x, x_size, kernel_size, stride, padding, border):
    image = x.new_empty(x_size[0], 0, *x_size[1:3], device="meta")
    size = [x_size[0], *_output_size(image, kernel_size, stride, padding, (1, 1)), border]
    return _planes(x, size, x.shape[1], x.shape[3])


@_fake
def bitmap_linear(x, values, bitmap, offsets, bias, out_features, activation):
    return x.new_empty(x.shape[0], out_features)


@_fake
def lanes_linear(x, values, codes, bases, starts, order, scale, bias, out_features, activation):
    return x.new_empty(x.shape[0], out_features)


@_fake
def nm_linear(x, values, choice, bias):
    return x.new_empty(x.shape[0], choice.shape[0])


@_fake
def nm_linear_t(dy, values, choice, t_choice):
    return dy.new_empty(dy.shape[0], 4 * choice.shape[1])


@_fake
def nm_sddmm(dy, x, choice):
    return dy.new_empty(choice.shape[0], 2 * choice.shape[1])


@_fake
def dense_sddmm(dy, x, mask):
    return dy.new_empty(mask.shape)


@_fake
def zero_pruned_(grad, mask):
    return None


def _blocks_linear(x, values, crow_indices, col_indices, row_order, bias, out_features, activation):
    return x.new_empty(x.shape[0], out_features)


def _blocks_linear_t(dy, values, t_crow, t_row, t_perm, t_order, in_features):
    return dy.new_empty(dy.shape[0], in_features)


def _blocks_sddmm(dy, x, crow_indices, col_indices, runs, block):
    return dy.new_empty(col_indices.shape[0], *block)


def _blocks_linear_backward(
    dy, x, values, crow_indices, col_indices, runs, t_crow, t_row, t_perm, t_order, need_dx, need_dvalues, need_dbias
):
    return (
        dy.new_empty(x.shape if need_dx else 0),
        dy.new_empty(values.shape if need_dvalues else 0),
        dy.new_empty(dy.shape[1] if need_dbias else 0),
    )


def _blocks_conv2d(
    x, values, crow_indices, col_indices, row_order, bias, out_channels, kernel_size,
    stride, padding, dilation, groups, activation,
):  # fmt: skip
    return _image(x, x.shape[0], out_channels, *_output_size(x, kernel_size, stride, padding, dilation))


def _blocks_conv2d_t(
    dy, values, t_crow, t_row, t_perm, t_order, in_channels, input_size, kernel_size, stride, padding, dilation, groups
):
    return _image(dy, dy.shape[0], in_channels, *input_size)


def _blocks_conv2d_sddmm(
    dy, x, crow_indices, col_indices, runs, block, kernel_size, stride, padding, dilation, groups
):
    return dy.new_empty(col_indices.shape[0], *block)


def _blocks_conv2d_backward(
    dy, x, values, crow_indices, col_indices, runs, t_crow, t_row, t_perm, t_order,
    kernel_size, stride, padding, dilation, groups, need_dx, need_dvalues, need_dbias,
):  # fmt: skip
    return (
        _image(dy, *x.shape) if need_dx else dy.new_empty(0),
        dy.new_empty(values.shape if need_dvalues else 0),
        dy.new_empty(dy.shape[1] if need_dbias else 0),
    )


for _name, _verb in _BLOCKED.items():
    torch.library.register_fake(f"sparsekit::{_name}", globals()[f"_blocks_{_verb}"], lib=_lib)
