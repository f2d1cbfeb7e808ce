"""Planes: images as sparse convolutions read them, kept between layers; and the naive twins of their operators.

``size = [n, h, w, border]``. Planes are ``[ceil(n / lanes), channels, positions, lanes]``: ``lanes`` samples side by
side, 1 or as many as a cache line holds; positions row by row of ``h + 2 border`` rows of ``w + 2 border``, zeros
around an image, then zeros up to an odd number of cache lines. Lanes past the last sample hold anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference

__all__ = ["csr_conv2d_planes", "from_planes", "full_lanes", "max_pool2d_planes", "positions", "to_planes"]


def full_lanes(dtype: torch.dtype) -> int:
    """Samples that lie side by side where more than one does: a cache line of them."""
    return 64 // dtype.itemsize


def positions(size: list[int], lanes: int, dtype: torch.dtype) -> int:
    """From one plane to the next: whole lines, an odd number of them, and one to read past the end of a lone sample."""
    _, h, w, border = size
    line = full_lanes(dtype) // lanes
    lines = -(-(h + 2 * border) * (w + 2 * border) // line) + (lanes == 1)
    return (lines | 1) * line


def to_planes(x: Tensor, border: int, lanes: int) -> Tensor:
    """Planes of images ``[n, c, h, w]``; lanes that hold none are 0."""
    n, c, h, w = x.shape
    groups = -(-n // lanes)
    size, count = [n, h, w, border], (h + 2 * border) * (w + 2 * border)
    x = F.pad(x, (border,) * 4 + (0, 0, 0, groups * lanes - n)).reshape(groups, lanes, c, count).permute(0, 2, 3, 1)
    return F.pad(x, (0, 0, 0, positions(size, lanes, x.dtype) - x.shape[2])).contiguous()


def from_planes(planes: Tensor, size: list[int]) -> Tensor:
    """The contiguous images ``[n, c, h, w]`` that planes hold."""
    n, h, w, border = size
    groups, c, _, lanes = planes.shape
    rows, pitch = h + 2 * border, w + 2 * border
    x = planes[:, :, : rows * pitch].reshape(groups, c, rows, pitch, lanes)
    x = x[:, :, border : border + h, border : border + w].permute(0, 4, 1, 2, 3)
    return x.reshape(groups * lanes, c, h, w)[:n].contiguous()


def csr_conv2d_planes(
    x, x_size, values, crow_indices, col_indices, bias, kernel_size, stride, padding, dilation, groups,
    code_key, activation, skip, skip_size, lanes, border,
):  # fmt: skip
    x = from_planes(x, x_size) if x_size else x
    skip = from_planes(skip, skip_size) if skip_size else skip
    y = reference.csr_conv2d(
        x, values, crow_indices, col_indices, bias, kernel_size, stride, padding, dilation, groups,
        code_key, activation, skip,
    )  # fmt: skip
    return y.contiguous() if border < 0 else to_planes(y, border, lanes)


def max_pool2d_planes(x, x_size, kernel_size, stride, padding, border):
    y = reference.max_pool2d(from_planes(x, x_size), kernel_size, stride, padding)
    return to_planes(y, border, x.shape[3])
