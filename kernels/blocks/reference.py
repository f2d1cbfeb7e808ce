"""The naive twin of every operator on blocks: make the weight dense, then let torch do it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..reference import activate, image
from . import layout


def _from_transposed(values, t_crow, t_row, t_perm, shape, groups):
    """The dense weight from the list that the input gradient reads."""
    g = layout.grid(shape, tuple(values.shape[1:]), groups)
    segment = torch.repeat_interleave(t_crow.diff().long(), output_size=t_row.numel())
    group, col = segment // (g.cols * g.taps), segment // g.taps % max(g.cols, 1)
    row, tap = t_row.long() % max(g.rows, 1), segment % g.taps
    place = ((group * g.rows + row) * g.taps + tap) * g.cols + col
    tiles = values.new_zeros(g.groups * g.rows * g.taps * g.cols, *g.block)
    tiles = tiles.index_put((place,), values[t_perm.long()])
    return layout.unblocks(tiles.view(g.groups * g.rows, g.taps * g.cols, *g.block), shape, groups)


def linear(x, values, crow_indices, col_indices, row_order, bias, out_features, activation):
    weight = layout.scatter(values, crow_indices, col_indices, (out_features, x.shape[1]), 1)
    return activate(F.linear(x, weight, bias), activation)


def linear_t(dy, values, t_crow, t_row, t_perm, t_order, in_features):
    return dy @ _from_transposed(values, t_crow, t_row, t_perm, (dy.shape[1], in_features), 1)


def sddmm(dy, x, crow_indices, col_indices, runs, block):
    return layout.gather(dy.t() @ x, crow_indices, col_indices, tuple(block), 1)


def linear_backward(
    dy, x, values, crow_indices, col_indices, runs, t_crow, t_row, t_perm, t_order, need_dx, need_dvalues, need_dbias
):
    return (
        linear_t(dy, values, t_crow, t_row, t_perm, t_order, x.shape[1]) if need_dx else dy.new_empty(0),
        sddmm(dy, x, crow_indices, col_indices, runs, values.shape[1:]) if need_dvalues else dy.new_empty(0),
        dy.sum(0) if need_dbias else dy.new_empty(0),
    )


def conv2d(
    x, values, crow_indices, col_indices, row_order, bias, out_channels, kernel_size,
    stride, padding, dilation, groups, activation,
):  # fmt: skip
    shape = (out_channels, x.shape[1] // groups, *kernel_size)
    weight = layout.scatter(values, crow_indices, col_indices, shape, groups)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return image(activate(y, activation), x)


def conv2d_t(
    dy, values, t_crow, t_row, t_perm, t_order, in_channels, input_size, kernel_size, stride, padding, dilation, groups
):
    shape = (dy.shape[1], in_channels // groups, *kernel_size)
    weight = _from_transposed(values, t_crow, t_row, t_perm, shape, groups)
    size = (dy.shape[0], in_channels, *input_size)
    dx = torch.nn.grad.conv2d_input(size, weight, dy, stride, padding, dilation, groups)
    return image(dx, dy)


def conv2d_sddmm(
    dy, x, crow_indices, col_indices, runs, block, kernel_size, stride, padding, dilation, groups
):
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    grad = torch.nn.grad.conv2d_weight(x, shape, dy, stride, padding, dilation, groups)
    return layout.gather(grad, crow_indices, col_indices, tuple(block), groups)


def conv2d_backward(
    dy, x, values, crow_indices, col_indices, runs, t_crow, t_row, t_perm, t_order,
    kernel_size, stride, padding, dilation, groups, need_dx, need_dvalues, need_dbias,
):  # fmt: skip
    conv = (kernel_size, stride, padding, dilation, groups)
    transposed = (t_crow, t_row, t_perm, t_order)
    index = (crow_indices, col_indices, runs)
    return (
        conv2d_t(dy, values, *transposed, x.shape[1], x.shape[2:], *conv) if need_dx else dy.new_empty(0),
        conv2d_sddmm(dy, x, *index, values.shape[1:], *conv) if need_dvalues else dy.new_empty(0),
        dy.sum((0, 2, 3)) if need_dbias else dy.new_empty(0),
    )
