"""``lanes``: the survivors in the order in which vector lanes take them, to serve a few samples at a time on a CPU.

``values [steps, 64]`` and ``codes [steps, 64]``: in every step each of 64 rows takes at most one survivor from a window
of 64 inputs that is held in registers, so nothing is gathered (see :mod:`.layout`). Five bytes a slot. Its product with
one sample takes less than half the time of csr's; for more than a few csr's tiles are faster. The kernel needs AVX-512.
Gradients, convolutions and float64 are dense products of torch with the weight made dense, so this is a format to serve
with, not to train in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsekit import _native
from sparsekit.format import Format

from ..reference import activate, conv2d_backward
from . import layout

_ops = torch.ops.sparsekit


class Lanes(Format):
    name = "lanes"
    index_names = ("codes", "bases", "starts", "order")
    epilogue = ("relu", "gelu", "silu")
    serves = 16

    def __init__(self):
        build = _native.status()["build"] or {}
        self.fast = build.get("active_isa", "").startswith("avx512")  # asked for in every call

    def index(self, mask, groups=1):
        return layout.index(mask)

    def survivors(self, index, shape):
        place, present = self._places(index, shape)
        flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool, device=place.device)
        flat[place[present]] = True
        return flat.view(shape)

    def gather(self, weight, index):
        return layout.gather(weight, self._places(index, weight.shape)[0])

    def scatter(self, values, index, shape):
        return layout.scatter(values, self._places(index, shape)[0], shape)

    def check(self, values, index, shape):
        return layout.check(values, index, shape)

    def unsupported(self, mask, groups=1):
        return "the lanes kernel is for linear layers, not for convolutions" if mask.dim() != 2 else None

    def absent(self, where, mask, groups=1):
        if where.type != "cpu":
            return "no kernel for a GPU"
        return _native.lacks_cpu() or (None if self.fast else "its kernel needs AVX-512")

    def stored(self, mask, groups=1):
        return layout.slots(mask), ""

    def linear(self, x, values, bias, index, shape, activation="none"):
        if x.dtype == torch.float64 or x.device.type != "cpu" or not self.fast:
            return activate(F.linear(x, self._weight(values, index, shape), bias), activation)
        return _ops.lanes_linear.default(x, values, *index, None, bias, shape[0], activation)

    def linear_t(self, dy, values, index, shape):
        return dy @ self._weight(values, index, shape)

    def sddmm(self, dy, x, index, shape):
        return self._gather(dy.t() @ x, index)

    def conv2d(self, x, values, bias, index, shape, conv, activation="none"):
        return activate(F.conv2d(x, self._weight(values, index, shape), bias, *conv), activation)

    def conv2d_t(self, dy, values, index, shape, conv, size):
        weight = self._weight(values, index, shape)
        return torch.nn.grad.conv2d_input((dy.shape[0], shape[1] * conv.groups, *size), weight, dy, *conv)

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        return self._gather(torch.nn.grad.conv2d_weight(x, shape, dy, *conv), index)

    def conv2d_backward(self, dy, x, values, index, shape, conv, needs):
        dx, dweight, dbias = conv2d_backward(dy, x, self._weight(values, index, shape), conv, needs)
        return dx, self._gather(dweight, index) if needs[1] else None, dbias

    def _places(self, index, shape):
        return layout.places(*(index[name] for name in self.index_names), shape)

    def _weight(self, values, index, shape):
        return self.scatter(values, dict(zip(self.index_names, index, strict=True)), torch.Size(shape))

    def _gather(self, dense, index):
        return self.gather(dense, dict(zip(self.index_names, index, strict=True)))


FORMAT = Lanes()
