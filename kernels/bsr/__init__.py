"""``bsr``: the survivors in dense blocks, for ``block:RxC`` masks.

Triton kernels on CUDA for blocks of 8 to 128 on a side: those of 64 and 128 feed Hopper's widest matrix
instructions. Native kernels on the CPU, vectors (16x1, 8x1, 1x16) and 4x4 blocks included.
"""

from __future__ import annotations

from importlib.util import find_spec

from sparsekit import _native

from ..blocks.format import Blocked

_SIDES = (128, 64, 32, 16, 8)
# Largest first; of one area the squarer first, which serves the input gradient as well as the product.
_TILES = sorted(((r, c) for r in _SIDES for c in _SIDES), key=lambda rc: (-rc[0] * rc[1], abs(rc[0] - rc[1]), -rc[0]))


class Bsr(Blocked):
    name = "bsr"
    verbs = ("linear", "linear_t", "sddmm", "linear_backward", "conv2d", "conv2d_t", "conv2d_sddmm", "conv2d_backward")
    families = (tuple(_TILES), ((16, 1), (8, 1)), ((4, 4),), ((1, 16),))
    otherwise = (16, 16)
    worth = 0.5  # half-empty blocks are no better off than a kernel that skips single weights

    def absent(self, where, mask, groups=1):
        if where.type == "cpu":
            return _native.lacks_cpu()
        if find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        rows, cols = self.block(mask, groups)
        return None if (rows, cols) in self.families[0] else f"no kernel for {rows}x{cols} blocks on a GPU"


FORMAT = Bsr()
