"""What a GPU can do at most: how many CTAs share a multiprocessor, and how long a sparse product must take.

Two estimates, both in microseconds. :func:`limit` is what no kernel of a format can beat: the products of
the survivors at the card's dense rate, or every tensor moved once at its copy rate. :func:`model` adds the
traffic between L2 and the multiprocessors, which binds most block-sparse kernels; it is a model, fitted to
nothing measured, and as good as the L2 bandwidth that it is given.
"""

from __future__ import annotations

import math
from typing import NamedTuple

WARP, MAX_THREADS, MAX_CTAS, REGISTERS = 32, 2048, 32, 65536  # of one multiprocessor, sm_80 and sm_90 alike
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor
SHARED_CTA = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one CTA may ask for; the rest is the system's
_RESERVED = 1024  # bytes of shared memory that the system keeps for each CTA


class Card(NamedTuple):
    """Rates of a card: ``flops`` FLOP/s by dtype, ``copy`` and ``l2`` bytes/s (read plus written)."""

    name: str
    flops: dict[str, float]
    copy: float
    l2: float


class Product(NamedTuple):
    """One sparse product ``y[M, N] = x[M, K] Wᵀ``, its input gradient or its weight gradient.

    A convolution is the same product with M pixels and K = taps x channels, whose input has only K / taps
    columns. ``work`` is ``forward``, ``dx``, ``dw`` or ``step``; ``itemsize`` the bytes of an element.
    """

    work: str
    m: int
    n: int
    k: int
    density: float
    itemsize: int = 2
    taps: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions with survivors."""
        return round(2 * self.m * self.n * self.k * self.density) * (3 if self.work == "step" else 1)

    @property
    def bytes(self) -> int:
        """Bytes of x, y and the survivors, each moved once by each of its products."""
        x, y = self.m * self.k // self.taps, self.m * self.n
        return round((x + y + self.n * self.k * self.density) * self.itemsize) * (3 if self.work == "step" else 1)


H200 = Card("H200 (790 TF bf16 and 4.3 TB/s known, L2 assumed 6 TB/s)", {"bfloat16": 790e12, "float16": 790e12,
            "tf32": 395e12, "float32": 60e12}, 4.3e12, 6e12)  # fmt: skip
A100 = Card("A100 80 GB (data sheet; L2 assumed 4 TB/s)", {"bfloat16": 312e12, "float16": 312e12,
            "tf32": 156e12, "float32": 19.5e12}, 2.0e12, 4e12)  # fmt: skip
CARDS = {80: A100, 90: H200}
_OVERHEAD = 1.1  # prologues, tails and waves over the traffic of the inner loop


def ctas(arch: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """CTAs that fit one multiprocessor of ``arch`` (80 or 90), and what stops the next one.

    Registers are handed out by 256 to a warp, shared memory by 1 KiB more than a CTA asks for.
    """
    by = {
        "registers": REGISTERS // (math.ceil(max(registers, 1) * WARP / 256) * 256 * warps),
        "shared memory": SHARED[arch] // (shared + _RESERVED),
        "threads": min(MAX_THREADS // (warps * WARP), MAX_CTAS),
    }
    what = min(by, key=by.get)
    return by[what], what


def limit(product: Product, card: Card, dtype: str) -> float:
    """Microseconds that no kernel on these survivors can beat on ``card``."""
    return max(product.flops / card.flops[dtype], product.bytes / card.copy) * 1e6


def model(product: Product, block: tuple[int, int], tile: int, card: Card, dtype: str, splits: int = 8) -> float:
    """Modelled microseconds of a kernel that holds ``tile`` tokens (for dW: inputs) beside one block of outputs.

    For each multiplication both operands come from L2 once per tile: 1/rows + 1/tile elements, where rows
    are the block's outputs (for dX: its inputs). wgmma with both operands in shared memory reaches
    2 rows / (64 + rows) of its rate. dW writes ``splits`` fp32 partials and reads them again.
    """
    if product.work == "step":
        return sum(model(product._replace(work=w), block, tile, card, dtype, splits) for w in ("forward", "dx", "dw"))
    rows = block[1] if product.work == "dx" else block[0]
    moved = product.flops / 2 * (1 / rows + 1 / tile) * product.itemsize * _OVERHEAD
    rate = card.flops[dtype] * min(1.0, 2 * rows / (64 + rows))
    seconds = max(moved / card.l2, product.flops / rate, product.bytes / card.copy)
    if product.work == "dw" and splits > 1:
        seconds += 2 * 4 * splits * product.n * product.k * product.density / card.copy
    return seconds * 1e6
