"""What the linear and the convolution kernels share: the epilogue, the sum of partial results, small facts."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

__all__ = [
    "activate", "aligned", "bucket", "capability", "check", "input_precision", "load", "processors", "sum_splits",
    "traceable", "unit",
]  # fmt: skip

_BLOCK = 1024  # elements that one program of the sum adds


def traceable(kernel):
    """A kernel that torch.compile sees when it is launched; one of Triton's interpreter stays as it is."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel  # torch 2.11 refuses the latter


@triton.jit
def _normal(x):
    """The normal distribution function, within 8e-8 (Abramowitz and Stegun 26.2.17).

    ``tl.erf`` needs so many registers that the widest tiles spill.
    """
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = series * tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361592)
    return tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def activate(acc, ACTIVATION: tl.constexpr):
    """``acc`` (fp32) under an activation; NaN stays NaN."""
    if ACTIVATION == "relu":
        acc = tl.where(acc <= 0.0, 0.0, acc)
    elif ACTIVATION == "gelu":
        acc *= _normal(acc)
    elif ACTIVATION == "silu":
        acc = acc / (1.0 + tl.exp(-acc))
    else:
        tl.static_assert(ACTIVATION == "none", "Expected an activation of none, relu, gelu, silu")
    return acc


@triton.jit
def load(pointers, inside, MASKED: tl.constexpr):
    """A tile, 0 where not ``inside``; no mask is paid for where everything is."""
    return tl.load(pointers, mask=inside, other=0.0) if MASKED else tl.load(pointers)


@triton.jit(do_not_specialize=["total"])
def _sum(
    partials, result, bias, total, width,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    at = start + offset
    inside = at < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLIT):  # always in this order, so equal inputs give equal bits
        acc += tl.load(partials + at, mask=inside, other=0.0)
        partials += total
    if HAS_BIAS:
        column = ((start % width).to(tl.int32) + offset) % width  # one long division, not one for each element
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + at, activate(acc, ACTIVATION).to(result.dtype.element_ty), mask=inside)


def sum_splits(partials: Tensor, dtype: torch.dtype, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(partials.sum(0) + bias)`` in ``dtype``, added in order, so equal inputs give equal bits.

    Shapes: ``partials [S, ..., width]`` fp32, contiguous; ``bias [width]``.
    """
    shape = partials.shape[1:]
    result = torch.empty(shape, dtype=dtype, device=partials.device)
    total, width = result.numel(), shape[-1]
    traceable(_sum)[((total + _BLOCK - 1) // _BLOCK,)](
        partials, result, partials if bias is None else bias, total, width,
        SPLIT=partials.shape[0], HAS_BIAS=bias is not None, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return result


def unit(extent: int) -> int:
    """The largest power of two up to 16 that divides a row's length: what a kernel may know of its alignment."""
    return next(u for u in (16, 8, 4, 2, 1) if extent % u == 0)


def aligned(x: Tensor) -> Tensor:
    """``x [N, width]`` contiguous; columns of 0 follow where a kernel would else read under 8 bytes at a time."""
    width = x.shape[1]
    if unit(width) * x.element_size() >= 8:
        return x.contiguous()
    return F.pad(x, (0, -width % 16)).contiguous()


def input_precision(dtype: torch.dtype, conv: bool = False) -> str:
    """``"tf32"`` or ``"ieee"``: how ``tl.dot`` multiplies fp32, as torch is set for its own products."""
    backend = torch.backends.cudnn.conv if conv else torch.backends.cuda.matmul
    return "tf32" if dtype == torch.float32 and backend.fp32_precision == "tf32" else "ieee"


def bucket(extent: int) -> int:
    """The power of two at or above an extent: shapes of one bucket share a tuned configuration."""
    return 1 << max(extent - 1, 0).bit_length()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) where the interpreter runs kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 where the interpreter runs kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def check(*tensors: Tensor | None) -> None:
    """Raise ValueError where tensors differ in dtype or device; None is passed over."""
    first, *others = [tensor for tensor in tensors if tensor is not None]
    for other in others:
        if other.dtype != first.dtype or other.device != first.device:
            raise ValueError(
                f"Expected tensors of one dtype and device, got {first.dtype} on {first.device} and "
                f"{other.dtype} on {other.device}"
            )
