"""Triton kernels of the block-sparse linear layer; ``linear.py`` launches them and says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from . import common


@triton.jit(do_not_specialize=["tokens"])
def product(
    x, values, bias, y, starts, partner, perm, order, tokens, rows, x_units, y_units,
    R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    RAGGED_IN: tl.constexpr, RAGGED_OUT: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile ``[BM, block]`` of ``y``; rows of x and y are ``units * UNIT`` long.

    ``starts`` delimits the blocks of a row (column), ``partner`` says which columns (rows) they meet, ``perm``
    which of ``values`` they are; without TRANSPOSED they lie in order and perm is not read.
    """
    SIDE: tl.constexpr = R if TRANSPOSED else C  # of a block, along the sum
    ACROSS: tl.constexpr = C if TRANSPOSED else R
    BN: tl.constexpr = ACROSS if ACROSS > 16 else 16
    DEEP: tl.constexpr = SIDE // BK if SIDE > BK else 1  # products in a block
    J: tl.constexpr = BK // SIDE if BK > SIDE else 1  # blocks in a product
    width = x_units * X_UNIT
    outs = y_units * Y_UNIT

    row = tl.load(order + tl.program_id(0) % rows)
    m = tl.program_id(0) // rows * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    n = tl.arange(0, BN)
    j = k // SIDE if J > 1 else 0
    inner = k % SIDE
    x_rows = x + tl.minimum(m, tokens - 1).to(tl.int64)[:, None] * width  # rows past the end repeat the last
    lo = tl.load(starts + row)
    count = tl.load(starts + row + 1) - lo
    last = tl.maximum(lo + count - 1, 0)
    if TRANSPOSED:
        tile = values + inner[:, None] * C + (n % ACROSS)[None, :]
    else:
        tile = values + lo.to(tl.int64) * (R * C) + inner[:, None] + (n % ACROSS)[None, :] * C

    begin = 0
    end = (count * DEEP + J - 1) // J
    if SPLIT > 1:
        share = (end + SPLIT - 1) // SPLIT
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, end)
    # Indices are loaded one step ahead: loaded in their own step they would drain the pipeline.
    at = tl.minimum(lo + begin // DEEP * J + j, last)
    next_partner = tl.load(partner + at)
    if TRANSPOSED:
        next_block = tl.load(perm + at)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(begin, end):
        met = next_partner
        at = tl.minimum(lo + (i + 1) // DEEP * J + j, last)
        next_partner = tl.load(partner + at)
        depth = i % DEEP * BK
        column = met * SIDE + (depth + inner)
        inside = column < width
        if J > 1:
            real = i * J + j < count
            inside = inside & real if RAGGED_IN else real
        a = common.load(x_rows + column[None, :], inside[None, :], MASKED=J > 1 or RAGGED_IN)
        if TRANSPOSED:
            block = next_block.to(tl.int64) if WIDE else next_block
            next_block = tl.load(perm + at)
            offset = block * (R * C) + depth * C
        else:
            offset = (i // DEEP * J + j) * (R * C) + depth
        b = tl.load(tile + offset[:, None], mask=real[:, None], other=0.0) if J > 1 else tl.load(tile + offset)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    out = row * ACROSS + n
    kept = (m < tokens)[:, None]
    if RAGGED_OUT or BN > ACROSS:
        kept = kept & ((n < ACROSS) & (out < outs))[None, :]
    if SPLIT > 1:
        y += tl.program_id(1).to(tl.int64) * tokens * outs
    else:
        if HAS_BIAS:
            acc += common.load(bias + out, out < outs, MASKED=RAGGED_OUT or BN > ACROSS).to(tl.float32)[None, :]
        acc = common.activate(acc, ACTIVATION)
    tl.store(y + m.to(tl.int64)[:, None] * outs + out[None, :], acc.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens"])
def sddmm(
    dy, x, crow, col, runs, dvalues, tokens, outs, ins, nnzb, dy_units, x_units,
    R: tl.constexpr, C: tl.constexpr, G: tl.constexpr, DY_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, J: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``J`` neighbouring blocks of ``dvalues``, or their partial sums over one of SPLIT slices of the tokens.

    A run has up to ``G`` blocks. Inputs lie on the matrix unit's long side where a block has few outputs. Rows of
    dy and x are ``units * UNIT`` long, of which the first ``outs`` and ``ins`` count.
    """
    BR: tl.constexpr = R if R > 16 else 16
    JC: tl.constexpr = J * C
    SWAP: tl.constexpr = R < 64
    dy_row = dy_units * DY_UNIT
    x_row = x_units * X_UNIT

    run = tl.program_id(0) // (G // J)
    row = tl.load(runs + 2 * run)
    first = tl.load(runs + 2 * run + 1)
    end = tl.minimum(first + G, tl.load(crow + row + 1))
    first += tl.program_id(0) % (G // J) * J
    n = tl.arange(0, JC)
    r = tl.arange(0, BR) % R
    t = tl.arange(0, BT)
    block = first + n // C
    column = tl.load(col + tl.minimum(block, end - 1)) * C + n % C
    out = row * R + r
    has_column = column < x_row
    has_out = out < dy_row

    size = ((tokens + SPLIT - 1) // SPLIT + BT - 1) // BT * BT
    begin = tl.program_id(1) * size
    count = tl.where(first < end, tl.minimum(size, tokens - begin), 0)  # below 1 where nothing is left to do
    dy += begin.to(tl.int64) * dy_row
    x += begin.to(tl.int64) * x_row
    # Operands are addressed the way the product reads them: transposed after loading, one would go through
    # registers on sm_80. The left one is transposed.
    if SWAP:
        left_at = t[None, :] * x_row + column[:, None]
        right_at = t[:, None] * dy_row + out[None, :]
        has_left = has_column[:, None]
        has_right = has_out[None, :]
        acc = tl.zeros((JC, BR), tl.float32)
    else:
        left_at = t[None, :] * dy_row + out[:, None]
        right_at = t[:, None] * x_row + column[None, :]
        has_left = has_out[:, None]
        has_right = has_column[None, :]
        acc = tl.zeros((BR, JC), tl.float32)
    for _ in range(0, count // BT):
        if SWAP:
            left = common.load(x + left_at, has_left, MASKED=RAGGED)
            right = common.load(dy + right_at, has_right, MASKED=RAGGED)
        else:
            left = common.load(dy + left_at, has_left, MASKED=RAGGED)
            right = common.load(x + right_at, has_right, MASKED=RAGGED)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        dy += BT * dy_row
        x += BT * x_row
    rest = count % BT
    if rest > 0:  # outside the loop, which then needs no mask over tokens
        real_left = has_left & (t < rest)[None, :]
        real_right = has_right & (t < rest)[:, None]
        if SWAP:
            left = tl.load(x + left_at, mask=real_left, other=0.0)
            right = tl.load(dy + right_at, mask=real_right, other=0.0)
        else:
            left = tl.load(dy + left_at, mask=real_left, other=0.0)
            right = tl.load(x + right_at, mask=real_right, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    if SPLIT > 1:
        dvalues += tl.program_id(1).to(tl.int64) * nnzb * (R * C)
    at = block.to(tl.int64) * (R * C) + n % C
    ours = block < end
    rows = tl.arange(0, BR)
    if SWAP:
        if RAGGED:  # what sticks out is 0, even where an Inf met the 0 that was loaded for it
            acc = tl.where((column < ins)[:, None] & (out < outs)[None, :], acc, 0.0)
        place = at[:, None] + rows[None, :] * C
        kept = ours[:, None] & (rows < R)[None, :]
    else:
        if RAGGED:
            acc = tl.where((out < outs)[:, None] & (column < ins)[None, :], acc, 0.0)
        place = at[None, :] + rows[:, None] * C
        kept = ours[None, :] & (rows < R)[:, None]
    tl.store(dvalues + place, acc.to(dvalues.dtype.element_ty), mask=kept)
