"""The naive twin of every operator: make the weight dense, then let torch do it.

Oracle of the tests, and the implementation wherever no native kernel is registered (another device,
or an installation without a compiler).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def activate(y: Tensor, activation: str) -> Tensor:
    """``y`` under one of the activations that kernels fuse; raises ValueError for others."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"Expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation](y)


def csr_dense(values: Tensor, crow_indices: Tensor, col_indices: Tensor, cols: int) -> Tensor:
    """``[out, cols]`` from CSR parts."""
    rows = crow_indices.numel() - 1
    row = torch.repeat_interleave(crow_indices.diff().long(), output_size=values.numel())
    return values.new_zeros(rows, cols).index_put((row, col_indices.long()), values)


def csc_dense(values: Tensor, t_crow: Tensor, t_row: Tensor, t_perm: Tensor, rows: int) -> Tensor:
    """``[rows, in]`` from the transposed index over the same values."""
    return csr_dense(values[t_perm.long()], t_crow, t_row, rows).t()


def sample(dense: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """``dense [out, in]`` at the survivors, ``[nnz]``."""
    row = torch.repeat_interleave(crow_indices.diff().long(), output_size=col_indices.numel())
    return dense[row, col_indices.long()]


def csr_linear(x, values, crow_indices, col_indices, bias, code_key=None, activation="none"):
    return activate(F.linear(x, csr_dense(values, crow_indices, col_indices, x.shape[1]), bias), activation)


def csr_chain(x, values, crow_indices, col_indices, biases, code_keys, activations):
    for parts in zip(values, crow_indices, col_indices, biases, code_keys, activations, strict=True):
        x = csr_linear(x, *parts)
    return x


def csr_linear_t(dy, values, t_crow, t_row, t_perm):
    return dy @ csc_dense(values, t_crow, t_row, t_perm, dy.shape[1])


def csr_sddmm(dy, x, crow_indices, col_indices):
    return sample(dy.t() @ x, crow_indices, col_indices)


def csr_linear_backward(
    dy, x, values, crow_indices, col_indices, t_crow, t_row, t_perm, need_dx, need_dvalues, need_dbias, code_key=None
):
    empty = dy.new_empty(0)
    return (
        csr_linear_t(dy, values, t_crow, t_row, t_perm) if need_dx else empty,
        csr_sddmm(dy, x, crow_indices, col_indices) if need_dvalues else empty.clone(),
        dy.sum(0) if need_dbias else empty.clone(),
    )


def _conv_weight(dense: Tensor, in_channels: int, kernel_size: list[int], groups: int) -> Tensor:
    return dense.reshape(dense.shape[0], in_channels // groups, *kernel_size)


def image_format(like: Tensor) -> torch.memory_format:
    """How a convolution of ``like`` lays out its result: channels_last on a GPU, the format of ``like`` elsewhere."""
    last = like.is_cuda or (not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last))
    return torch.channels_last if last else torch.contiguous_format


def image(result: Tensor, like: Tensor) -> Tensor:
    """A result of a convolution of ``like``, laid out so."""
    form = image_format(like)
    if result.numel() == 0:
        return torch.empty_like(result, memory_format=form)  # torch leaves odd strides in an empty gradient
    return result.contiguous(memory_format=form)


def csr_conv2d(
    x, values, crow_indices, col_indices, bias, kernel_size, stride, padding, dilation, groups,
    code_key=None, activation="none", skip=None,
):  # fmt: skip
    cols = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    weight = _conv_weight(csr_dense(values, crow_indices, col_indices, cols), x.shape[1], kernel_size, groups)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if skip is not None:
        if skip.shape != y.shape or skip.dtype != y.dtype:
            raise ValueError(
                f"csr_conv2d: Expected skip of shape {list(y.shape)} and dtype {y.dtype}, "
                f"got {list(skip.shape)} of {skip.dtype}"
            )
        y = y + skip
    return image(activate(y, activation), x)


def csr_conv2d_t(
    dy, values, t_crow, t_row, t_perm, input_size, kernel_size, stride, padding, dilation, groups
):
    weight = csc_dense(values, t_crow, t_row, t_perm, dy.shape[1])
    channels = weight.shape[1] // (kernel_size[0] * kernel_size[1]) * groups
    weight = _conv_weight(weight, channels, kernel_size, groups)
    shape = (dy.shape[0], channels, *input_size)
    return image(torch.nn.grad.conv2d_input(shape, weight, dy, stride, padding, dilation, groups), dy)


def csr_conv2d_sddmm(
    dy, x, crow_indices, col_indices, kernel_size, stride, padding, dilation, groups
):
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    grad = torch.nn.grad.conv2d_weight(x, shape, dy, stride, padding, dilation, groups)
    return sample(grad.flatten(1), crow_indices, col_indices)


def csr_conv2d_backward(
    dy, x, values, crow_indices, col_indices, t_crow, t_row, t_perm,
    kernel_size, stride, padding, dilation, groups, need_dx, need_dvalues, need_dbias, code_key=None,
):  # fmt: skip
    empty = dy.new_empty(0)
    conv = (kernel_size, stride, padding, dilation, groups)
    return (
        csr_conv2d_t(dy, values, t_crow, t_row, t_perm, x.shape[2:], *conv) if need_dx else empty,
        csr_conv2d_sddmm(dy, x, crow_indices, col_indices, *conv) if need_dvalues else empty.clone(),
        dy.sum((0, 2, 3)) if need_dbias else empty.clone(),
    )


def max_pool2d(x, kernel_size, stride, padding):
    return F.max_pool2d(x, kernel_size, stride, padding)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def clear_pruned_(grad, mask):
    # Numbers times the mask would make NaN of Inf; masked_fill_ takes twenty times as long as multiplying bits does.
    grad.view(_BITS[grad.element_size()]).mul_(mask)


def dense_sddmm(dy, x, mask):
    grad = dy.t() @ x
    clear_pruned_(grad, mask)
    return grad


def zero_pruned_(grad: Tensor, mask: Tensor) -> Tensor:
    """Set ``grad`` to exactly 0 where ``mask`` is False, in place, Inf and NaN included.

    Batches of gradients (``is_grads_batched``) have no bits to clear, and a compiler fuses what it knows.
    """
    if torch.compiler.is_compiling():
        clear_pruned_(grad, mask)
        return grad
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        return torch.where(mask, grad, grad.new_zeros(()))
    torch.ops.sparsekit.zero_pruned_.default(grad, mask)
    return grad


def conv2d_backward(dy, x, weight, conv, needs):
    """Gradients of a dense convolution's input, weight and bias, each only where ``needs`` says so."""
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [weight.shape[0]], conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, needs
    )
