"""``csr``: the survivors row by row, for unstructured masks.

``values [nnz]``, ``crow_indices int32 [out + 1]``, ``col_indices int32 [nnz]`` over the weight viewed
as ``[out, in * kh * kw]``; the transposed index ``t_crow, t_row, t_perm`` serves the input gradient on
the same values. ``code_key int64 [2]`` hashes the index on a CPU: the library compiles a mask once and finds its
machine code again by that name.
"""

from __future__ import annotations

import torch

from sparsekit import _native
from sparsekit.format import Format

from ..reference import activate
from . import layout

_ops = torch.ops.sparsekit


class Csr(Format):
    name = "csr"
    derived_names = ("t_crow", "t_row", "t_perm", "code_key")
    epilogue = ("relu", "gelu", "silu")
    adds = True
    index_names = ("crow_indices", "col_indices", "code_key", "t_crow", "t_row", "t_perm")

    def index(self, mask, groups=1):
        return layout.csr(mask)

    def prepare(self, index, shape):
        if index["col_indices"].device.type != "cpu":
            return {}
        return {"code_key": layout.code_key(index["crow_indices"], index["col_indices"])}

    def derive(self, index, shape):
        return layout.transposed(index["crow_indices"], index["col_indices"], layout.columns(shape))

    def survivors(self, index, shape):
        return layout.mask(index["crow_indices"], index["col_indices"], shape)

    def gather(self, weight, index):
        return layout.gather(weight, index["crow_indices"], index["col_indices"])

    def scatter(self, values, index, shape):
        return layout.scatter(values, index["crow_indices"], index["col_indices"], shape)

    def check(self, values, index, shape):
        return layout.check(values, index["crow_indices"], index["col_indices"], shape)

    def unsupported(self, mask, groups=1):
        if mask.numel() >= 2**31 and int(mask.sum()) >= 2**31:
            return "more survivors than a 32-bit index counts"
        return None

    def absent(self, where, mask, groups=1):
        if where.type == "cpu":
            return _native.lacks_cpu()
        return "no csr convolution kernel for a GPU" if mask.dim() > 2 else _native.lacks_cuda()

    def linear(self, x, values, bias, index, shape, activation="none"):
        if activation == "none" or x.device.type == "cpu":
            return _ops.csr_linear.default(x, values, index[0], index[1], bias, index[2], activation)
        return activate(_ops.csr_linear.default(x, values, index[0], index[1], bias), activation)

    def linear_t(self, dy, values, index, shape):
        return _ops.csr_linear_t.default(dy, values, *index[3:])

    def sddmm(self, dy, x, index, shape):
        return _ops.csr_sddmm.default(dy, x, index[0], index[1])

    def linear_backward(self, dy, x, values, index, shape, needs):
        if not needs[0]:
            index = _without_transpose(index)
        return _ops.csr_linear_backward.default(dy, x, values, *index[:2], *index[3:], *needs, index[2])

    def conv2d(self, x, values, bias, index, shape, conv, activation="none", skip=None):
        lists, how = index[:2], (index[2], activation, skip)
        return _ops.csr_conv2d.default(x, values, *lists, bias, shape[2:], *conv, *how)

    def conv2d_t(self, dy, values, index, shape, conv, size):
        return _ops.csr_conv2d_t.default(dy, values, *index[3:], size, shape[2:], *conv)

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        return _ops.csr_conv2d_sddmm.default(dy, x, index[0], index[1], shape[2:], *conv)

    def conv2d_backward(self, dy, x, values, index, shape, conv, needs):
        if not needs[0]:
            index = _without_transpose(index)
        lists = (*index[:2], *index[3:])
        return _ops.csr_conv2d_backward.default(dy, x, values, *lists, shape[2:], *conv, *needs, index[2])


def _without_transpose(index):
    """The operators read the transposed index for the input gradient alone; a first layer never builds it."""
    return (*index[:3], index[0], index[1], index[1])


FORMAT = Csr()
