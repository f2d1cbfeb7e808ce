"""Differentiation, once for all formats: the backward of each verb is made of the other verbs.

A gradient of a gradient (``create_graph=True``) is rare, so it goes through the dense weight, whose
operations torch can differentiate any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .format import Format

__all__ = ["Conv2dFunction", "LinearFunction"]


class LinearFunction(torch.autograd.Function):
    """``x Wᵀ + bias`` for ``x [N, in]``."""

    @staticmethod
    def forward(ctx, x, values, bias, fmt: Format, shape, *index):
        ctx.save_for_backward(x, values, *index)
        ctx.fmt, ctx.shape = fmt, shape
        return fmt.linear(x, values, bias, index, shape)

    @staticmethod
    def backward(ctx, dy):
        x, values, *index = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            weight = _weight(ctx.fmt, values, index, torch.Size(ctx.shape))
            dx = dy @ weight if needs[0] else None
            dvalues = _gather(ctx.fmt, dy.t() @ x, index) if needs[1] else None
            grads = dx, dvalues, dy.sum(0) if needs[2] else None
        else:
            index = _derived(ctx.fmt, index, ctx.shape)
            grads = ctx.fmt.linear_backward(dy, x, values, index, ctx.shape, needs)
        return _only(grads, needs) + (None,) * (2 + len(index))


class Conv2dFunction(torch.autograd.Function):
    """The convolution of ``x [N, C, H, W]`` with W, plus bias."""

    @staticmethod
    def forward(ctx, x, values, bias, fmt: Format, shape, conv, *index):
        ctx.save_for_backward(x, values, *index)
        ctx.fmt, ctx.shape, ctx.conv = fmt, shape, conv
        return fmt.conv2d(x, values, bias, index, shape, conv)

    @staticmethod
    def backward(ctx, dy):
        x, values, *index = ctx.saved_tensors
        needs, conv = ctx.needs_input_grad[:3], ctx.conv
        if torch.is_grad_enabled():
            weight = _weight(ctx.fmt, values, index, torch.Size(ctx.shape))
            dx = torch.nn.grad.conv2d_input(x.shape, weight, dy, *conv) if needs[0] else None
            dvalues = None
            if needs[1]:
                dvalues = _gather(ctx.fmt, torch.nn.grad.conv2d_weight(x, ctx.shape, dy, *conv), index)
            grads = dx, dvalues, dy.sum((0, 2, 3)) if needs[2] else None
        else:
            index = _derived(ctx.fmt, index, ctx.shape)
            grads = ctx.fmt.conv2d_backward(dy, x, values, index, ctx.shape, conv, needs)
        return _only(grads, needs) + (None,) * (3 + len(index))


def _only(grads, needs):
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _named(fmt: Format, index) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(fmt.index_names, index, strict=True) if tensor is not None}


def _derived(fmt: Format, index, shape):
    """Modules build the derived index once; a model compiled before its first backward gets here without."""
    if not fmt.derived_names or index[fmt.index_names.index(fmt.derived_names[0])] is not None:
        return index
    named = _named(fmt, index)
    named |= fmt.derive(named, shape)
    return [named.get(name) for name in fmt.index_names]


def _weight(fmt: Format, values: Tensor, index, shape) -> Tensor:
    return fmt.scatter(values, _named(fmt, index), shape)


def _gather(fmt: Format, grad: Tensor, index) -> Tensor:
    return fmt.gather(grad, _named(fmt, index))
