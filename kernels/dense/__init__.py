"""``dense``: the whole weight and a mask. Always a candidate, and the rival of every other format.

Pruned entries of ``values`` are 0 and their gradient is exactly 0, so no optimizer moves them: the
forward pass needs no multiplication by the mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsekit import _native
from sparsekit.format import Format

from ..reference import conv2d_backward, zero_pruned_

_SAMPLES, _MANY = (4, 64), 1 << 18  # weights


class Dense(Format):
    name = "dense"
    index_names = ("mask",)
    masked = True

    def index(self, mask, groups=1):
        return {"mask": mask.clone()}

    def survivors(self, index, shape):
        return index["mask"]

    def gather(self, weight, index):
        # Not weight * mask: a pruned Inf or NaN must become 0, here and in the gradient.
        return torch.where(index["mask"], weight, weight.new_zeros(()))

    def scatter(self, values, index, shape):
        return self.gather(values, index)

    def check(self, values, index, shape):
        mask = index["mask"]
        if mask.dtype != torch.bool or mask.shape != shape or values.shape != shape:
            return f"values and a bool mask of shape {list(shape)}, got {list(values.shape)} and {list(mask.shape)}"
        if bool((values.detach()[~mask] != 0).any()):
            return "values that are 0 where the mask is False, got others"
        return None

    def stored(self, mask, groups=1):
        return mask.numel(), ""

    def fused(self, x, shape):
        # A large weight and few samples: a gradient written masked is faster than torch's; one sample's is not.
        return (
            shape[0] * shape[1] >= _MANY
            and _SAMPLES[0] * shape[1] <= x.numel() <= _SAMPLES[1] * shape[1]
            and x.dtype in (torch.float32, torch.float64)
            and x.device.type == "cpu"
            and _native.load()
        )

    def linear(self, x, values, bias, index, shape):
        return F.linear(x, values, bias)

    def linear_t(self, dy, values, index, shape):
        return dy @ values

    def sddmm(self, dy, x, index, shape):
        if self.fused(x, shape):
            return torch.ops.sparsekit.dense_sddmm.default(dy, x, index[0])
        return zero_pruned_(dy.t() @ x, index[0])

    def conv2d(self, x, values, bias, index, shape, conv):
        return F.conv2d(x, values, bias, *conv)

    def conv2d_t(self, dy, values, index, shape, conv, size):
        x = dy.new_empty(1).expand(dy.shape[0], shape[1] * conv.groups, *size)
        return conv2d_backward(dy, x, values, conv, (True, False, False))[0]

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        weight = dy.new_empty(1).expand(shape)
        return zero_pruned_(conv2d_backward(dy, x, weight, conv, (False, True, False))[1], index[0])

    def conv2d_backward(self, dy, x, values, index, shape, conv, needs):
        dx, dvalues, dbias = conv2d_backward(dy, x, values, conv, needs)
        return dx, zero_pruned_(dvalues, index[0]) if needs[1] else None, dbias


FORMAT = Dense()
