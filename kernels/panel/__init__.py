"""``panel``: rows of 8 or 16 outputs that share their input columns, for vectors, small blocks and unstructured masks.

The same storage as ``bsr`` with blocks of 8 or 16 outputs by 1, 4, 8 or 16 inputs; an unstructured mask is
kept as the union of the columns of every 8 outputs, with holes. CUDA kernels for tensor cores in bf16, fp16
and tf32. The input gradient of blocks 1 or 4 inputs wide is a dense product: they have nothing to share there.
"""

from __future__ import annotations

import torch

from sparsekit import _native
from sparsekit.format import Format

from ..blocks import reference
from ..blocks.format import Blocked
from ..reference import conv2d_backward

_VERBS = ("linear", "linear_t", "sddmm", "conv2d", "conv2d_t", "conv2d_sddmm")
_SHARED = 8  # inputs a block must have for the transposed product to share anything


class Panel(Blocked):
    name = "panel"
    verbs = _VERBS
    families = (((16, 16), (16, 8), (8, 16), (8, 8)), ((16, 4), (8, 4)), ((16, 1), (8, 1)))
    otherwise = (8, 1)
    worth = 0.0  # the union of a panel's columns may well win at low density: measured, not guessed

    linear_backward = Format.linear_backward  # each gradient is a launch of its own
    conv2d_backward = Format.conv2d_backward

    def absent(self, where, mask, groups=1):
        return "no kernel for the CPU" if where.type == "cpu" else _native.lacks_cuda()

    def run(self, verb, first, *args):
        if first.device.type == "cuda" and not _multiplies(first.dtype, verb):
            return getattr(reference, verb)(first, *args)
        return super().run(verb, first, *args)

    def linear_t(self, dy, values, index, shape):
        if values.shape[2] < _SHARED:
            return dy @ self.scatter(values, self.named(index), torch.Size(shape))
        return super().linear_t(dy, values, index, shape)

    def conv2d_t(self, dy, values, index, shape, conv, size):
        if values.shape[2] < _SHARED:
            weight = self.scatter(values, self.named(index), torch.Size(shape))
            x = dy.new_empty(1).expand(dy.shape[0], shape[1] * conv.groups, *size)
            return conv2d_backward(dy, x, weight, conv, (True, False, False))[0]
        return super().conv2d_t(dy, values, index, shape, conv, size)


def _multiplies(dtype, verb):
    """Whether tensor cores multiply a dtype as torch is set: fp32 only where it may be rounded to tf32."""
    if dtype == torch.float32:
        backend = torch.backends.cudnn.conv if verb.startswith("conv") else torch.backends.cuda.matmul
        return backend.fp32_precision == "tf32"
    return dtype in (torch.float16, torch.bfloat16)


FORMAT = Panel()
