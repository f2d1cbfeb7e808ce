"""Stateless calls: :func:`sparse_linear` and :func:`sparse_conv2d`, the doors to every format's kernels."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .autograd import Conv2dFunction, LinearFunction, in_cxx, masked
from .format import Conv, Format, Index
from .kernels.reference import activate

__all__ = ["check_conv2d", "check_linear", "sparse_conv2d", "sparse_linear", "transformed"]

_active, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state  # asked in every call


def transformed() -> bool:
    """Whether a transform is at work that knows torch's own operators only.

    ``torch.func`` (vmap, grad, jvp, …), forward-mode differentiation and ``torch.jit.trace``: under them layers
    compute through their dense weight, exactly and at a dense layer's speed.
    """
    return _active() or forward_ad._current_level >= 0 or _tracing() is not None


def sparse_linear(
    x: Tensor,
    values: Tensor,
    index: Index,
    shape: torch.Size,
    fmt: Format,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``activation(x Wᵀ + bias)`` with W stored in a format; differentiable in x, values and bias.

    Args: ``x [..., in]`` and ``values`` of one floating dtype (autocast casts both), ``index`` the
    format's index tensors in the order of ``fmt.index_names``, ``shape`` = ``(out, in)``, ``activation``
    none, relu, gelu or silu: part of the product where the format's kernels fuse it and no gradient is due.
    Returns: ``[..., out]``. Raises: ValueError when the last dimension of x is not ``in``.
    """
    transform = transformed()
    if not transform and (y := in_cxx(x, values, bias, index, shape, fmt, None, activation)) is not NotImplemented:
        return y
    check_linear(x, shape)
    size = x.shape
    if transform:
        return activate(F.linear(x, _weight(values, index, shape, fmt), bias), activation)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # torch raises on meta
        x, values, bias = _autocast(x, values, bias)
    if len(size) != 2:
        if x.is_nested:  # jagged: the rows of all sequences lie one after the other
            y = sparse_linear(x.values(), values, index, shape, fmt, bias, activation)
            return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths(), x._ragged_idx)
        x = x.reshape(prod(size[:-1]), shape[1])  # -1 is ambiguous when a layer has no inputs
        return sparse_linear(x, values, index, shape, fmt, bias, activation).view(*size[:-1], shape[0])
    if torch.is_grad_enabled() and _differentiable(x, values, bias):
        if fmt.masked and not fmt.fused(x, shape):
            y = F.linear(x, masked(values, index[0]), bias)
        else:
            y = LinearFunction.apply(x, values, bias, (fmt, shape, index))
    elif activation in fmt.epilogue:
        y, activation = fmt.linear(x, values, bias, index, shape, activation), "none"
    else:
        y = fmt.linear(x, values, bias, index, shape)
    return y if activation == "none" else activate(y, activation)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    index: Index,
    shape: torch.Size,
    fmt: Format,
    bias: Tensor | None = None,
    conv: Conv = Conv(),  # noqa: B008 - an immutable tuple
    activation: str = "none",
    skip: Tensor | None = None,
) -> Tensor:
    """The 2-D convolution of x with W stored in a format, plus ``skip``, activated; differentiable in all tensors.

    Args: ``x [N, C, H, W]`` or ``[C, H, W]``, ``shape`` = ``(out, in/groups, kh, kw)``, ``skip`` whatever can be added
    to the result, the rest as in :func:`sparse_linear`. Returns: ``[N, out, OH, OW]``.
    Raises: ValueError when the channels do not fit or the kernel is larger than the padded image.
    """
    if skip is not None and not _adds(x, values, bias, shape, fmt, conv, skip):
        y = sparse_conv2d(x, values, index, shape, fmt, bias, conv)
        alone = not torch.is_grad_enabled() and not transformed() and isinstance(skip, Tensor)
        y = y.add_(skip) if alone and (skip.shape, skip.dtype) == (y.shape, y.dtype) else y + skip
        return y.relu_() if alone and activation == "relu" else activate(y, activation)
    transform = transformed()
    if not transform and skip is None:
        y = in_cxx(x, values, bias, index, shape, fmt, conv, activation)
        if y is not NotImplemented:
            return y
    check_conv2d(x, shape, conv)
    if transform:
        return activate(F.conv2d(x, _weight(values, index, shape, fmt), bias, *conv), activation)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # torch raises on meta
        x, values, bias = _autocast(x, values, bias)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    if torch.is_grad_enabled() and _differentiable(x, values, bias):
        if fmt.masked:
            y = F.conv2d(batch, masked(values, index[0]), bias, *conv)
        else:
            y = Conv2dFunction.apply(batch, values, bias, (fmt, shape, index, conv))
    elif skip is not None:
        y, activation = fmt.conv2d(batch, values, bias, index, shape, conv, activation, skip), "none"
    elif activation in fmt.epilogue:
        y, activation = fmt.conv2d(batch, values, bias, index, shape, conv, activation), "none"
    else:
        y = fmt.conv2d(batch, values, bias, index, shape, conv)
        if activation == "relu":  # nobody else has seen y
            y, activation = y.relu_(), "none"
    if activation != "none":
        y = activate(y, activation)
    return y if x.dim() == 4 else y.squeeze(0)


def _adds(x: Tensor, values: Tensor, bias: Tensor | None, shape: torch.Size, fmt: Format, conv: Conv, skip) -> bool:
    """Whether the kernel of a convolution can add ``skip``: a tensor like its result, and nothing is differentiated."""
    if not fmt.adds or not isinstance(skip, Tensor) or not (x.is_cpu and x.dim() == 4 and skip.is_cpu):
        return False
    if torch.is_grad_enabled() and (skip.requires_grad or _differentiable(x, values, bias)):
        return False
    if transformed() or torch.is_autocast_enabled("cpu"):
        return False
    sides = zip(x.shape[2:], conv.padding, conv.dilation, shape[2:], conv.stride, strict=True)
    image = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sides]
    return skip.dtype == x.dtype == values.dtype and list(skip.shape) == [x.shape[0], shape[0], *image]


def check_linear(x: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless x is an input of a linear layer with a weight of ``shape``."""
    if not x.shape or x.shape[-1] != shape[1]:
        raise ValueError(f"Expected an input of shape [..., {shape[1]}], got {list(x.shape)}")


def check_conv2d(x: Tensor, shape: torch.Size, conv: Conv) -> None:
    """Raise ValueError unless x is an input of a convolution with a weight of ``shape``."""
    if x.dim() not in (3, 4) or x.shape[-3] != shape[1] * conv.groups:
        raise ValueError(f"Expected an input of shape [N, {shape[1] * conv.groups}, H, W], got {list(x.shape)}")
    for i in (0, 1):
        extent = x.shape[i - 2] + 2 * conv.padding[i]
        kernel = conv.dilation[i] * (shape[2 + i] - 1) + 1
        if extent < kernel:
            raise ValueError(f"Expected a padded input of at least {kernel} along axis {i - 2}, got {extent}")


def _weight(values: Tensor, index: Index, shape: torch.Size, fmt: Format) -> Tensor:
    named = {name: tensor for name, tensor in zip(fmt.index_names, index, strict=True) if tensor is not None}
    return fmt.scatter(values, named, torch.Size(shape))


def _differentiable(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    return values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)


def _autocast(x: Tensor, values: Tensor, bias: Tensor | None):
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype == torch.float64:  # torch's autocast leaves double alone
        return x, values, bias
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
