"""Images that stay as sparse convolutions read them: padded planes, from one layer to the next."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import format as formats
from ..functional import transformed
from ..kernels.csr.planes import from_planes, full_lanes

__all__ = ["Planes", "convolve", "pool"]

_CSR = formats.get("csr")
_conv2d, _max_pool2d = torch.ops.sparsekit.csr_conv2d_planes.default, torch.ops.sparsekit.max_pool2d_planes.default
_DTYPES = (torch.float32, torch.float64)
_WIDE = 512  # pixels of an image that a sample at a time is as quick for


class Planes(Tensor):
    """Images ``[N, C, H, W]`` held as planes (kernels/csr/planes.py) with a border of zeros, without a gradient.

    Whatever torch does with them is done with the images, unpacked once.
    """

    @staticmethod
    def __new__(cls, held: Tensor, size: list[int]) -> Planes:
        """``size``: samples, height, width, border."""
        return Tensor._make_wrapper_subclass(cls, (size[0], held.shape[1], *size[1:3]), dtype=held.dtype)

    def __init__(self, held: Tensor, size: list[int]) -> None:
        self.held, self.size4, self._images = held, size, None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """torch's operators see the images."""
        return function(*pytree.tree_map_only(Planes, Planes.images, args),
                        **pytree.tree_map_only(Planes, Planes.images, kwargs or {}))  # fmt: skip

    def images(self) -> Tensor:
        """The images as a contiguous tensor; from now on it is what is held, for somebody may write to it."""
        if self._images is None:
            self._images, self.held = from_planes(self.held, self.size4), None
        return self._images

    def __repr__(self, **kwargs) -> str:
        return f"Planes({self.images()!r})"

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.images(), memo)

    def __reduce_ex__(self, protocol):
        return self.images().__reduce_ex__(protocol)


def convolve(layer, x: Tensor, skip: Tensor | None, activation: str) -> Tensor:
    """What a sparse convolution gives for planes, or gives as planes; NotImplemented where images are due.

    ``layer.border``: the zeros around the planes of its result, or None for images.
    """
    own, conv = layer._parameters, layer._conv
    values = own.get("values")
    if layer.format is not _CSR or layer._outer is not None or values is None or not (_serves() and _like(values, x)):
        return NotImplemented
    n, channels, h, w = x.shape
    if channels != layer.in_channels or (skip is not None and not _like(values, skip)):
        return NotImplemented
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.shape[2:], conv.stride, conv.padding, conv.dilation
    oh, ow = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    if oh < 1 or ow < 1 or (skip is not None and list(skip.shape) != [n, layer.out_channels, oh, ow]):
        return NotImplemented
    if activation == "none":
        activation = layer.activation
    elif layer.activation != "none":
        return NotImplemented
    x, x_size = _held(x)
    skip, skip_size = (None, []) if skip is None else _held(skip)
    if layer.border is None and not x_size and not skip_size:
        return NotImplemented
    held = max(t.shape[3] if size else 1 for t, size in ((x, x_size), (skip, skip_size)))
    lanes = held if held > 1 else _lanes(n, oh, ow, ow + dw * (kw - 1) // sw if sw == 1 else 0, x.dtype)
    border, index = -1 if layer.border is None else layer.border, layer._buffers
    y = _conv2d(x, x_size, values, index["crow_indices"], index["col_indices"], own.get("bias"), layer.shape[2:], *conv,
                index["code_key"], activation, skip, skip_size, lanes, border)  # fmt: skip
    return y if border < 0 else Planes(y, [n, oh, ow, border])


def pool(x: Planes, window: list[list[int]], border: int) -> Planes | None:
    """The largest of every window (kernel, stride, padding) of planes, as planes; None where images are due."""
    if x.held is None or not _serves():
        return None
    n, h, w, _ = x.size4
    oh, ow = ((size + 2 * p - k) // s + 1 for size, k, s, p in zip((h, w), *window, strict=True))
    if oh < 1 or ow < 1:
        return None
    return Planes(_max_pool2d(x.held, x.size4, *window, border), [n, oh, ow, border])


def _serves() -> bool:
    """Whether nothing asks for a graph or another dtype."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return not (torch.jit.is_tracing() or transformed())


def _like(values: Tensor, x: Tensor) -> bool:
    """Whether x is planes, or images that lie as planes are filled from, of the dtype of values."""
    if type(x) is Planes:
        return x.dtype is values.dtype
    if type(x) is not Tensor or x.dtype is not values.dtype or x.dtype not in _DTYPES:
        return False
    return x.dim() == 4 and x.is_cpu and values.is_cpu and x.is_contiguous()


def _held(x: Tensor) -> tuple[Tensor, list[int]]:
    if type(x) is not Planes:
        return x, []
    return (x._images, []) if x.held is None else (x.held, x.size4)


def _lanes(n: int, oh: int, ow: int, reach: int, dtype: torch.dtype) -> int:
    """Samples side by side: lines full of them, unless many would be empty or wide rows spare their transposition."""
    full = full_lanes(dtype)
    wide = dtype is torch.float32 and reach and 100 * ow >= 95 * reach and oh * ow >= _WIDE
    return 1 if wide or 10 * (-(-n // full) * full) > 16 * n else full
