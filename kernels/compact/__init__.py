"""``compact``: dead output and input units cut out, a smaller dense product on what is left.

``values [R, C, kh, kw]`` over the live ``rows`` and ``cols`` (int64); ``mask`` marks the survivors
inside when there are holes. Outputs of dead rows are the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsekit.format import Format

from ..reference import conv2d_backward, zero_pruned_


class Compact(Format):
    name = "compact"
    index_names = ("rows", "cols", "mask")
    optional_names = ("mask",)
    grouped = False

    def index(self, mask, groups=1):
        rows, cols = (live.nonzero().flatten() for live in _live(mask))
        if rows.numel() == 0:  # torch convolves no empty tensors: keep one unit, which is all hole
            rows, cols = (torch.arange(min(1, extent), device=mask.device) for extent in mask.shape[:2])
        index = {"rows": rows, "cols": cols}
        inner = mask[index["rows"]][:, index["cols"]]
        return index if bool(inner.all()) else index | {"mask": inner}

    def survivors(self, index, shape):
        full = torch.zeros(shape, dtype=torch.bool, device=index["rows"].device)
        full[index["rows"][:, None], index["cols"]] = index.get("mask", torch.ones((), dtype=torch.bool))
        return full

    def gather(self, weight, index):
        inner = weight[index["rows"]][:, index["cols"]]
        return _masked(inner, index.get("mask"))

    def scatter(self, values, index, shape):
        values = _masked(values, index.get("mask"))  # makes the gradient at holes exactly 0
        return values.new_zeros(shape).index_put((index["rows"][:, None], index["cols"]), values)

    def check(self, values, index, shape):
        for name, extent in (("rows", shape[0]), ("cols", shape[1])):
            live = index[name]
            if live.dim() != 1 or live.dtype != torch.int64 or not _ascends(live, extent):
                return f"{name} as ascending int64 indices below {extent}, got {live.dtype} {list(live.shape)}"
        inner = (index["rows"].numel(), index["cols"].numel(), *shape[2:])
        mask = index.get("mask")
        if values.shape != inner or (mask is not None and (mask.shape != inner or mask.dtype != torch.bool)):
            return f"values of shape {list(inner)} and a bool mask like it, got {list(values.shape)}"
        return None

    def unsupported(self, mask, groups=1):
        if groups != 1:
            return "grouped convolution"
        rows, cols = _live(mask)
        if not bool(rows.any()):
            return "no survivor"
        return "no dead input or output unit" if bool(rows.all() & cols.all()) else None

    def stored(self, mask, groups=1):
        rows, cols = (int(live.count_nonzero()) for live in _live(mask))
        return rows * cols * torch.Size(mask.shape[2:]).numel(), ""

    def linear(self, x, values, bias, index, shape):
        rows, cols = index[0], index[1]
        y = F.linear(x.index_select(1, cols), values, None if bias is None else bias.index_select(0, rows))
        return _spread(y, bias, rows, shape[0])

    def linear_t(self, dy, values, index, shape):
        dx = dy.index_select(1, index[0]) @ values
        return dx.new_zeros(dy.shape[0], shape[1]).index_copy_(1, index[1], dx)

    def sddmm(self, dy, x, index, shape):
        grad = dy.index_select(1, index[0]).t() @ x.index_select(1, index[1])
        return grad if index[2] is None else zero_pruned_(grad, index[2])

    def conv2d(self, x, values, bias, index, shape, conv):
        rows, cols = index[0], index[1]
        y = F.conv2d(x.index_select(1, cols), values, None if bias is None else bias.index_select(0, rows), *conv)
        return _spread(y, bias, rows, shape[0])

    def conv2d_t(self, dy, values, index, shape, conv, size):
        dy = dy.index_select(1, index[0])
        x = dy.new_empty(1).expand(dy.shape[0], values.shape[1], *size)
        dx = conv2d_backward(dy, x, values, conv, (True, False, False))[0]
        return dx.new_zeros(dx.shape[0], shape[1], *size).index_copy_(1, index[1], dx)

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        x, dy = x.index_select(1, index[1]), dy.index_select(1, index[0])
        weight = dy.new_empty(1).expand(dy.shape[1], x.shape[1], *shape[2:])
        grad = conv2d_backward(dy, x, weight, conv, (False, True, False))[1]
        return grad if index[2] is None else zero_pruned_(grad, index[2])


def _live(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which outputs and which inputs have a survivor; torch finds the maximum of bytes far faster than any()."""
    if mask.numel() == 0:
        return tuple(mask.new_zeros(extent) for extent in mask.shape[:2])
    taps = mask.view(torch.uint8).flatten(2).amax(2) if mask.dim() > 2 else mask.view(torch.uint8)
    return taps.amax(1).view(torch.bool), taps.amax(0).view(torch.bool)


def _masked(inner: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return inner if mask is None else torch.where(mask, inner, inner.new_zeros(()))


def _spread(y: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor, out: int) -> torch.Tensor:
    """Put the live channels of ``y [N, R, ...]`` back among ``out``; the dead ones hold their bias."""
    if rows.numel() == out:
        return y
    if bias is None:
        full = y.new_zeros(y.shape[0], out, *y.shape[2:])
    else:
        full = bias.view(1, -1, *[1] * (y.dim() - 2)).expand(y.shape[0], out, *y.shape[2:]).clone()
    # torch 2.11 loses the gradient of a compiled function's output that was written in place
    return full.index_copy(1, rows, y) if torch.compiler.is_compiling() else full.index_copy_(1, rows, y)


def _ascends(live: torch.Tensor, extent: int) -> bool:
    if live.numel() == 0:
        return extent == 0
    return int(live[0]) >= 0 and int(live[-1]) < extent and bool((live.diff() > 0).all())


FORMAT = Compact()
