"""``bsr``: the survivors in dense blocks of 8 to 128 on a side, for ``block:RxC`` masks.

Triton kernels on CUDA; blocks of 64 and 128 feed Hopper's widest matrix instructions.
"""

from __future__ import annotations

from importlib.util import find_spec

from ..blocks.format import Blocked
from ..blocks.layout import SHAPES


def _missing():
    return None if find_spec("triton") else "triton is not installed: pip install triton"


# Half-empty blocks are no better off than a kernel that skips single weights.
FORMAT = Blocked("bsr", SHAPES, otherwise=(16, 16), worth=0.5, missing=_missing)
