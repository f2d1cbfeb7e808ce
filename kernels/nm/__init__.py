"""``nm``: two of every four inputs, for 2:4 masks of linear layers and 1x1 convolutions.

``values [out, in/2]`` holds the survivors of each group of four inputs, ``choice`` (uint8 ``[out, in/4]``)
which two of the four they are. ``mask`` marks the survivors where a group has fewer: the other slots are 0
and their gradient is exactly 0. ``t_choice`` (uint8 ``[in, out/4]``) is the choice of the transposed weight
and is there where that is 2:4 as well: then the input gradient runs on sparse tensor cores too. The
weight's gradient is a dense product, sampled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsekit.format import Format

from ..reference import zero_pruned_
from . import cuda, layout

_ops = torch.ops.sparsekit


class Nm(Format):
    name = "nm"
    index_names = ("choice", "mask", "t_choice")
    optional_names = ("mask", "t_choice")
    grouped = False

    def index(self, mask, groups=1):
        if reason := layout.refusal(mask, groups):
            raise ValueError(f"Expected a mask that the 2:4 format can hold, got {reason}")
        return layout.index(mask)

    def survivors(self, index, shape):
        choice, mask = index["choice"], index.get("mask")
        if mask is None:
            mask = torch.ones(shape[0], shape[1] // 2, dtype=torch.bool, device=choice.device)
        return layout.scatter(mask, choice).view(shape)

    def gather(self, weight, index):
        return _masked(layout.gather(weight.flatten(1), index["choice"]), index.get("mask"))

    def scatter(self, values, index, shape):
        values = _masked(values, index.get("mask"))  # makes the gradient at free slots exactly 0
        return layout.scatter(values, index["choice"]).view(shape)

    def check(self, values, index, shape):
        return layout.check(values, index, shape)

    def unsupported(self, mask, groups=1):
        return layout.refusal(mask, groups) or cuda.unfit(mask.shape[0], mask.shape[1])

    def absent(self, where, mask, groups=1):
        return cuda.absent(where) if where.type == "cuda" else f"no 2:4 kernel on the {where.type.upper()}"

    def stored(self, mask, groups=1):
        return mask.numel() // 2, ""

    def linear(self, x, values, bias, index, shape):
        return _ops.nm_linear.default(x, values, index[0], bias)

    def linear_t(self, dy, values, index, shape):
        return _ops.nm_linear_t.default(dy, values, index[0], index[2])

    def sddmm(self, dy, x, index, shape):
        grad = _ops.nm_sddmm.default(dy, x, index[0])
        return grad if index[1] is None else zero_pruned_(grad, index[1])

    def conv2d(self, x, values, bias, index, shape, conv):
        last = x.is_contiguous(memory_format=torch.channels_last)
        x = _seen(x, conv)
        y = _image(self.linear(_pixels(x), values, bias, index, shape), x)
        return y if last else y.contiguous()

    def conv2d_t(self, dy, values, index, shape, conv, size):
        last = dy.is_contiguous(memory_format=torch.channels_last)
        dx = _image(self.linear_t(_pixels(dy), values, index, shape), dy)
        dx = dx if last else dx.contiguous()
        if conv.stride == (1, 1) and conv.padding == (0, 0):
            return dx
        (sh, sw), (ph, pw) = conv.stride, conv.padding
        padded = dx.new_zeros(dx.shape[0], shape[1], size[0] + 2 * ph, size[1] + 2 * pw)
        padded[:, :, ::sh, ::sw] = dx
        return padded[:, :, ph : ph + size[0], pw : pw + size[1]].contiguous()

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        return self.sddmm(_pixels(dy), _pixels(_seen(x, conv)), index, shape)


def _seen(x: torch.Tensor, conv) -> torch.Tensor:
    """The pixels of ``x [N, C, H, W]`` that a 1x1 convolution reads, ``[N, C, OH, OW]``."""
    (sh, sw), (ph, pw) = conv.stride, conv.padding
    if conv.padding != (0, 0):
        x = F.pad(x, (pw, pw, ph, ph))
    return x[:, :, ::sh, ::sw]


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """``[N, C, H, W]`` to ``[N * H * W, C]``; no copy of a channels-last image."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])


def _image(pixels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[N * H * W, C]`` to a channels-last ``[N, C, H, W]`` of the height and width of ``like``."""
    n, _, height, width = like.shape
    return pixels.view(n, height, width, pixels.shape[1]).permute(0, 3, 1, 2)


def _masked(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values if mask is None else torch.where(mask, values, values.new_zeros(()))


FORMAT = Nm()
