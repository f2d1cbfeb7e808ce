"""Differentiation, once for all formats: the backward of each verb is made of the other verbs.

A gradient of a gradient (``create_graph=True``) is rare, so it goes through the dense weight, whose
operations torch can differentiate any number of times. Where the nodes in C++ are there and nothing watches or
transforms, they do the same for csr, and :class:`Guard` never enters Python, to the bit.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from . import _nodes
from .format import Format
from .kernels.reference import zero_pruned_

__all__ = ["Conv2dFunction", "Guard", "LinearFunction", "guard", "in_cxx", "masked"]

_cxx = _nodes.load()
_transforming, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state  # asked in every call


def in_cxx(x, values, bias, index, shape, fmt: Format, conv, activation: str, scale=None) -> Tensor:
    """What ``sparse_linear`` (``conv`` None) or ``sparse_conv2d`` returns; NotImplemented: it must go on in Python."""
    if torch.compiler.is_compiling() or _cxx is None or fmt.name not in ("csr", "lanes"):
        return NotImplemented
    if fmt.name == "csr":
        return _cxx.csr(x, values, bias, index, shape, conv, activation)
    if conv is not None or not fmt.fast:
        return NotImplemented
    return _cxx.lanes(x, values, bias, index, shape, activation, scale)


def in_cxx_chain(x: Tensor, layers) -> Tensor:
    """What csr layers that follow each other give, no gradient being due; NotImplemented: it must go on in Python."""
    if _cxx is None or torch.compiler.is_compiling() or _transforming() or _tracing() is not None:
        return NotImplemented
    return _cxx.chain(x, layers[0].in_features, [(m._parameters, m._buffers, m.activation) for m in layers])


class LinearFunction(torch.autograd.Function):
    """``x Wᵀ + bias`` for ``x [N, in]``; ``layer`` is the format, shape and index tensors of W."""

    @staticmethod
    def forward(ctx, x, values, bias, layer):
        fmt, shape, index = layer
        _keep(ctx, x, values, index, layer)
        return fmt.linear(x, values, bias, index, shape)

    @staticmethod
    def backward(ctx, dy):
        x, values, *saved = ctx.saved_tensors
        fmt, shape, index = ctx.layer
        index = tuple(saved) if saved else index
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx = dy @ _weight(fmt, values, index, shape) if needs[0] else None
            dvalues = _gather(fmt, dy.t() @ x, index) if needs[1] else None
            dbias = dy.sum(0) if needs[2] else None
        else:
            index = _derived(fmt, index, shape) if needs[0] else index
            dx, dvalues, dbias = fmt.linear_backward(dy, x, values, index, shape, needs[:3])
        return dx if needs[0] else None, dvalues if needs[1] else None, dbias if needs[2] else None, None


class Conv2dFunction(torch.autograd.Function):
    """The convolution of ``x [N, C, H, W]`` with W, plus bias; ``layer`` is as above and the geometry."""

    @staticmethod
    def forward(ctx, x, values, bias, layer):
        fmt, shape, index, conv = layer
        _keep(ctx, x, values, index, layer)
        return fmt.conv2d(x, values, bias, index, shape, conv)

    @staticmethod
    def backward(ctx, dy):
        x, values, *saved = ctx.saved_tensors
        fmt, shape, index, conv = ctx.layer
        index = tuple(saved) if saved else index
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            weight = _weight(fmt, values, index, shape)
            dx = torch.nn.grad.conv2d_input(x.shape, weight, dy, *conv) if needs[0] else None
            dvalues = _gather(fmt, torch.nn.grad.conv2d_weight(x, shape, dy, *conv), index) if needs[1] else None
            dbias = dy.sum((0, 2, 3)) if needs[2] else None
        else:
            index = _derived(fmt, index, shape) if needs[0] else index
            dx, dvalues, dbias = fmt.conv2d_backward(dy, x, values, index, shape, conv, needs[:3])
        return dx if needs[0] else None, dvalues if needs[1] else None, dbias if needs[2] else None, None


class Guard:
    """A hook on a leaf: its gradient is exactly 0 where ``mask`` is False, whoever asks for it and however."""

    __torch_unserializable__ = True  # copies and files of the leaf have no hook; their layer gives them one

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, grad: Tensor) -> Tensor:
        return _mask_gradient(grad, self.mask)


def guard(values: Tensor, mask: Tensor | None) -> None:
    """Put a :class:`Guard` on a leaf, in place of any that it has for another mask; None takes that away."""
    if _cxx is not None:
        if mask is not None and values._backward_hooks is None:
            values._backward_hooks = OrderedDict()  # or the first hook of a user makes it, and clears C++'s
        return _cxx.guard(values, mask)
    hooks = values._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, Guard)]:
        if hooks[key].mask is mask:
            return
        del hooks[key]
    if mask is not None:
        values.register_hook(Guard(mask))


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` themselves, which are 0 where ``mask`` is False, with a gradient that is exactly 0 there too."""
    return _Masked.apply(values, mask) if values.requires_grad else values


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, mask):
        ctx.save_for_backward(mask)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        return _mask_gradient(grad, *ctx.saved_tensors), None


_NOBODY_ELSE = 2  # references to a gradient in backward(): autograd's and the Python object


def _mask_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _transforming():
        return torch.where(mask, grad, grad.new_zeros(()))
    return zero_pruned_(grad if _is_own(grad) else grad.clone(), mask)


def _is_own(grad: Tensor) -> bool:
    """Whether nobody else holds a gradient or memory of it; a transposed one holds what it is a view of."""
    if type(grad) is not Tensor or grad._use_count() > _NOBODY_ELSE:
        return False
    base = grad._base
    views, alone = (1, True) if base is None else (2, base._use_count() <= _NOBODY_ELSE)
    return alone and torch._C._storage_Use_Count(grad.untyped_storage()._cdata) <= views + 1  # and Python's object


def _keep(ctx, x, values, index, layer) -> None:
    # Constants of the layer are cheaper beside the saved tensors, but compiled autograd loses them there.
    if torch.compiler.is_compiling():
        ctx.save_for_backward(x, values, *index)
        layer = (*layer[:2], None, *layer[3:])
    else:
        ctx.save_for_backward(x, values)
    ctx.layer = layer


def _named(fmt: Format, index) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(fmt.index_names, index, strict=True) if tensor is not None}


def _derived(fmt: Format, index, shape):
    """Modules build the derived index once; a model compiled before its first backward gets here without."""
    if not fmt.derived_names or index[fmt.index_names.index(fmt.derived_names[0])] is not None:
        return index
    named = _named(fmt, index)
    named |= fmt.derive(named, shape)
    return tuple(named.get(name) for name in fmt.index_names)


def _weight(fmt: Format, values: Tensor, index, shape) -> Tensor:
    return fmt.scatter(values, _named(fmt, index), torch.Size(shape))


def _gather(fmt: Format, grad: Tensor, index) -> Tensor:
    return fmt.gather(grad, _named(fmt, index))
