"""``bitmap``: one bit for each weight and the survivors alone, for few tokens at a time.

``values [nnz]`` tile by tile of 8 x 8, ``bitmap`` (int64 ``[tile rows, tile columns]``) which weights of a
tile survive, ``offsets`` (int32) where each run of 16 tiles starts: see :mod:`.layout`. The product of a
linear layer with up to some 64 tokens is bound by reading the weight, and there is less to read: at density
d and 16 bits a weight ``d + 1/16`` of dense. Its kernel is the only one: gradients and convolutions are dense
products of torch with the weight made dense, so this is a format to serve with, not to train in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsekit.format import Format

from ..reference import activate, conv2d_backward
from . import layout

_ops = torch.ops.sparsekit


class Bitmap(Format):
    name = "bitmap"
    index_names = ("bitmap", "offsets")
    epilogue = ("relu", "gelu", "silu")

    def index(self, mask, groups=1):
        return layout.index(mask)

    def survivors(self, index, shape):
        return layout.mask(index["bitmap"], shape)

    def gather(self, weight, index):
        return layout.gather(weight, index["bitmap"])

    def scatter(self, values, index, shape):
        return layout.scatter(values, index["bitmap"], shape)

    def check(self, values, index, shape):
        return layout.check(values, index["bitmap"], index["offsets"], shape)

    def unsupported(self, mask, groups=1):
        if mask.dim() != 2:
            return "the bitmap kernel is for linear layers, not for convolutions"
        if int(mask.sum()) >= 2**31:
            return "more survivors than a 32-bit offset counts"
        return None

    def absent(self, where, mask, groups=1):
        if where.type == "cpu":
            return "no kernel for the CPU"
        if not torch._C._dispatch_has_kernel_for_dispatch_key("sparsekit::bitmap_linear", "CUDA"):
            return "the native library has no CUDA kernels: install with nvcc at hand"
        return None

    def linear(self, x, values, bias, index, shape, activation="none"):
        return _ops.bitmap_linear.default(x, values, index[0], index[1], bias, shape[0], activation)

    def linear_t(self, dy, values, index, shape):
        return dy @ layout.scatter(values, index[0], shape)

    def sddmm(self, dy, x, index, shape):
        return layout.gather(dy.t() @ x, index[0])

    def linear_backward(self, dy, x, values, index, shape, needs):
        return (
            self.linear_t(dy, values, index, shape) if needs[0] else None,
            layout.gather(dy.t() @ x, index[0], values.numel()) if needs[1] else None,
            dy.sum(0) if needs[2] else None,
        )

    def conv2d(self, x, values, bias, index, shape, conv, activation="none"):
        return activate(F.conv2d(x, layout.scatter(values, index[0], shape), bias, *conv), activation)

    def conv2d_t(self, dy, values, index, shape, conv, size):
        weight = layout.scatter(values, index[0], shape)
        return torch.nn.grad.conv2d_input((dy.shape[0], shape[1] * conv.groups, *size), weight, dy, *conv)

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        return layout.gather(torch.nn.grad.conv2d_weight(x, shape, dy, *conv), index[0])

    def conv2d_backward(self, dy, x, values, index, shape, conv, needs):
        weight = layout.scatter(values, index[0], shape)
        dx, dweight, dbias = conv2d_backward(dy, x, weight, conv, needs)
        return dx, layout.gather(dweight, index[0], values.numel()) if needs[1] else None, dbias


FORMAT = Bitmap()
