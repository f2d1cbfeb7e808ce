"""``bitmap``: one bit for each weight and the survivors alone, for few tokens at a time.

``values [nnz]`` tile by tile of 8 x 8, ``bitmap`` (int64 ``[tile rows, tile columns]``) which weights of a
tile survive, ``offsets`` (int32) where each run of 16 tiles starts: see :mod:`.layout`. ``count`` is an empty
tensor whose shape ``[0, nnz]`` tells how many survive without a look at the device. The product of a
linear layer with up to some 64 tokens is bound by reading the weight, and there is less to read: at density
d and 16 bits a weight ``d + 1/16`` of dense. Its kernel is the only one: gradients and convolutions are dense
products of torch with the weight made dense, so this is a format to serve with, not to train in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsekit import _native
from sparsekit.format import Format

from ..reference import activate, conv2d_backward
from . import layout, reference

_ops = torch.ops.sparsekit


class Bitmap(Format):
    name = "bitmap"
    index_names = ("bitmap", "offsets", "count")
    epilogue = ("relu", "gelu", "silu")

    def index(self, mask, groups=1):
        index = layout.index(mask)
        return index | {"count": torch.empty(0, int(index["offsets"][-1]), dtype=torch.int32, device=mask.device)}

    def survivors(self, index, shape):
        return layout.mask(index["bitmap"], shape)

    def gather(self, weight, index):
        return layout.gather(weight, index["bitmap"], index["count"].shape[1])

    def scatter(self, values, index, shape):
        return layout.scatter(values, index["bitmap"], shape)

    def check(self, values, index, shape):
        problem = layout.check(values, index["bitmap"], index["offsets"], shape)
        if problem is None and index["count"].shape != (0, values.numel()):
            return f"a count of shape [0, {values.numel()}], got {list(index['count'].shape)}"
        return problem

    def unsupported(self, mask, groups=1):
        if mask.dim() != 2:
            return "the bitmap kernel is for linear layers, not for convolutions"
        if mask.numel() >= 2**31 and int(mask.sum()) >= 2**31:
            return "more survivors than a 32-bit offset counts"
        return None

    def absent(self, where, mask, groups=1):
        return "no kernel for the CPU" if where.type == "cpu" else _native.lacks_cuda()

    def linear(self, x, values, bias, index, shape, activation="none"):
        if x.dtype == torch.float64 and x.device.type == "cuda":  # a kernel for serving has no use for it
            return reference.bitmap_linear(x, values, index[0], index[1], bias, shape[0], activation)
        return _ops.bitmap_linear.default(x, values, index[0], index[1], bias, shape[0], activation)

    def linear_t(self, dy, values, index, shape):
        return dy @ layout.scatter(values, index[0], shape)

    def sddmm(self, dy, x, index, shape):
        return layout.gather(dy.t() @ x, index[0], index[2].shape[1])

    def conv2d(self, x, values, bias, index, shape, conv, activation="none"):
        return activate(F.conv2d(x, layout.scatter(values, index[0], shape), bias, *conv), activation)

    def conv2d_t(self, dy, values, index, shape, conv, size):
        weight = layout.scatter(values, index[0], shape)
        return torch.nn.grad.conv2d_input((dy.shape[0], shape[1] * conv.groups, *size), weight, dy, *conv)

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        return layout.gather(torch.nn.grad.conv2d_weight(x, shape, dy, *conv), index[0], index[2].shape[1])

    def conv2d_backward(self, dy, x, values, index, shape, conv, needs):
        weight = layout.scatter(values, index[0], shape)
        dx, dweight, dbias = conv2d_backward(dy, x, weight, conv, needs)
        return dx, layout.gather(dweight, index[0], index[2].shape[1]) if needs[1] else None, dbias


FORMAT = Bitmap()
