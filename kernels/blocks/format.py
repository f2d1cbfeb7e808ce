"""A format of dense blocks: the verbs are operators of the format's name over one common index.

``values [blocks, R, C]`` are the trainable blocks, row by row of blocks; ``crow_indices`` and
``col_indices`` (int32) place them, ``row_order`` and ``runs`` are launch schedules that follow from them,
the transposed list ``t_*`` serves the input gradient on the same values. ``block`` is an empty tensor
whose shape ``[0, groups, R, C]`` tells the block size. ``mask`` marks the survivors where blocks have
holes. Holes, and entries that stick out of the weight, are 0 and their gradient is exactly 0.
"""

from __future__ import annotations

import torch

from sparsekit.format import Format

from ..reference import zero_pruned_
from . import layout


class Blocked(Format):
    """What formats of dense blocks have in common; each names its blocks and where it has kernels for them."""

    verbs: tuple[str, ...]
    """The operators it has."""
    families: tuple[tuple[tuple[int, int], ...], ...]
    """The blocks it takes, as :func:`layout.best_block` reads them."""
    otherwise: tuple[int, int]
    """The block for masks of other structures, kept with holes."""
    worth: float
    """The least share of survivors in their blocks at which such a mask is worth a measurement."""

    derived_names = ("t_crow", "t_row", "t_perm", "t_order")
    index_names = ("block", "crow_indices", "col_indices", "row_order", "runs", "mask", *derived_names)
    optional_names = ("mask",)
    epilogue = ("relu", "gelu", "silu")

    def run(self, verb, *args):
        """The operator of a verb."""
        return getattr(torch.ops.sparsekit, f"{self.name}_{verb}").default(*args)

    def named(self, index):
        """The index as a dict, without what is absent."""
        return {name: tensor for name, tensor in zip(self.index_names, index, strict=True) if tensor is not None}

    def index(self, mask, groups=1):
        block = self.block(mask, groups)
        index = {"block": torch.empty(0, groups, *block, dtype=torch.int32, device=mask.device)}
        index |= layout.index(mask, block, groups)
        if not layout.holds(mask, block, groups):
            index["mask"] = layout.gather(mask, index["crow_indices"], index["col_indices"], block, groups)
        return index

    def derive(self, index, shape):
        groups, *block = index["block"].shape[1:]
        grid = layout.grid(shape, tuple(block), groups)
        return layout.transposed(index["crow_indices"], index["col_indices"], grid)

    def survivors(self, index, shape):
        groups, *block = index["block"].shape[1:]
        alive = index.get("mask")
        if alive is None:
            alive = index["block"].new_ones(index["col_indices"].numel(), *block).bool()
        return layout.scatter(alive, index["crow_indices"], index["col_indices"], shape, groups)

    def gather(self, weight, index):
        groups, *block = index["block"].shape[1:]
        values = layout.gather(weight, index["crow_indices"], index["col_indices"], tuple(block), groups)
        return _masked(values, index.get("mask"))

    def scatter(self, values, index, shape):
        values = _masked(values, index.get("mask"))  # makes the gradient at holes exactly 0
        return layout.scatter(values, index["crow_indices"], index["col_indices"], shape, index["block"].shape[1])

    def check(self, values, index, shape):
        return layout.check(values, index, shape, [block for family in self.families for block in family])

    def unsupported(self, mask, groups=1):
        if not bool(mask.any()):
            return "no survivor"
        rows, cols = self.block(mask, groups)
        share = layout.fill(mask, (rows, cols), groups)
        if share < self.worth:
            return f"survivors fill {share:.0%} of the {rows}x{cols} blocks they touch; prune with a block pattern"
        return None

    def stored(self, mask, groups=1):
        rows, cols = self.block(mask, groups)
        return int(layout.alive(mask, (rows, cols), groups).count_nonzero()) * rows * cols, f"{rows}x{cols}"

    def block(self, mask, groups=1):
        """The (R, C) in which a mask is kept."""
        return layout.best_block(mask, self.families, groups) or self.otherwise

    def linear(self, x, values, bias, index, shape, activation="none"):
        return self.run("linear", x, values, *index[1:4], bias, shape[0], activation)

    def linear_t(self, dy, values, index, shape):
        return self.run("linear_t", dy, values, *index[6:], shape[1])

    def sddmm(self, dy, x, index, shape):
        block = index[0].shape[2:]
        return _zeroed(self.run("sddmm", dy, x, index[1], index[2], index[4], block), index[5])

    def linear_backward(self, dy, x, values, index, shape, needs):
        dx, dvalues, dbias = self.run("linear_backward", dy, x, values, *_backward(index, needs), *needs)
        return dx, _zeroed(dvalues, index[5]) if needs[1] else dvalues, dbias

    def conv2d(self, x, values, bias, index, shape, conv, activation="none"):
        return self.run("conv2d", x, values, *index[1:4], bias, shape[0], shape[2:], *conv, activation)

    def conv2d_t(self, dy, values, index, shape, conv, size):
        channels = shape[1] * conv.groups
        return self.run("conv2d_t", dy, values, *index[6:], channels, size, shape[2:], *conv)

    def conv2d_sddmm(self, dy, x, index, shape, conv):
        block = index[0].shape[2:]
        dvalues = self.run("conv2d_sddmm", dy, x, index[1], index[2], index[4], block, shape[2:], *conv)
        return _zeroed(dvalues, index[5])

    def conv2d_backward(self, dy, x, values, index, shape, conv, needs):
        index_ = _backward(index, needs)
        dx, dvalues, dbias = self.run("conv2d_backward", dy, x, values, *index_, shape[2:], *conv, *needs)
        return dx, _zeroed(dvalues, index[5]) if needs[1] else dvalues, dbias


def _backward(index, needs):
    """The index of a backward operator; a first layer never builds the transposed list, and none is read there."""
    transposed = index[6:] if needs[0] else (index[1], index[2], index[2], index[3])
    return (index[1], index[2], index[4], *transposed)


def _masked(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values if mask is None else torch.where(mask, values, values.new_zeros(()))


def _zeroed(grad: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return grad if mask is None else zero_pruned_(grad, mask)

