"""Triton kernels of the block-sparse convolution; ``conv.py`` launches them and says what they compute.

All images are NHWC. A *pixel* is one (image, row, column) of the tensor that a kernel writes, a *tap* one
(row, column) of the window. A list entry names a block as ``tap * blocks per tap + block``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate


@triton.jit
def _step(s, D: tl.constexpr, S: tl.constexpr, BACK: tl.constexpr):
    """How far tap ``s`` along one axis lies from a pixel's base: towards the front in the input gradient."""
    if BACK:
        return -(s * D // S)
    else:
        return s * D


@triton.jit
def _in_window(
    top, left, H, W, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Per pixel, one bit a tap: whether the tap falls inside the image and not on the padding."""
    line = tl.zeros_like(left).to(tl.int64 if KH * KW > 32 else tl.int32)
    bits = line
    for s in tl.static_range(KW):
        at = left + _step(s, DW, SW, BACK)
        line |= ((at >= 0) & (at < W)).to(line.dtype) << s
    for r in tl.static_range(KH):
        at = top + _step(r, DH, SH, BACK)
        bits |= tl.where((at >= 0) & (at < H), line, 0) << (r * KW)
    return bits


@triton.jit
def _entry(ptr, i, count, k, SIDE: tl.constexpr, BK: tl.constexpr):
    """The list entry of step ``i``: one, or one per column of a product that covers several blocks."""
    if BK > SIDE:
        at = i + k // SIDE
        return tl.max_constancy(tl.load(ptr + at, mask=at < count, other=0), [SIDE])
    else:
        return tl.load(ptr + i // (SIDE // BK), mask=i < count, other=0)


@triton.jit
def _accumulate(
    acc, source, values, entries, perm, count, bits, W, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BACK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc [BM, R]`` (``[BM, C]`` if BACK) plus the products of ``count`` blocks with what they read.

    ``source`` [BM, 1] points at each pixel's base in the image read, CHANNELS to a pixel, of which GROUP are
    the group's; ``values`` at the first block, or, if BACK, at all of them, of which ``perm`` picks. Every
    product is BK deep: a part of a block or several blocks side by side.
    """
    SIDE: tl.constexpr = R if BACK else C
    SPLIT: tl.constexpr = SIDE // BK if SIDE > BK else 1
    JOIN: tl.constexpr = BK // SIDE if BK > SIDE else 1
    NB: tl.constexpr = (GROUP + SIDE - 1) // SIDE
    k = tl.arange(0, BK)
    inner = k % SIDE
    count *= SPLIT
    source += inner[None, :]
    if BACK:
        values += inner[:, None] * C + tl.arange(0, C)[None, :]
        next_block = _entry(perm, 0, count, k, SIDE, BK)
    else:
        values += (k // SIDE * (R * C) + inner)[None, :] + tl.arange(0, R)[:, None] * C
    next_entry = _entry(entries, 0, count, k, SIDE, BK)
    for i in range(0, count, JOIN):
        entry = next_entry  # indices come one step ahead: loaded in the step, they would stall its pipeline
        next_entry = _entry(entries, i + JOIN, count, k, SIDE, BK)
        tap = entry // NB
        first = entry % NB * SIDE + i % SPLIT * BK
        offset = (_step(tap // KW, DH, SH, BACK) * W + _step(tap % KW, DW, SW, BACK)) * CHANNELS + first
        live = k // SIDE < count - i
        if JOIN > 1:  # a last product that blocks do not fill must not read what might be NaN
            ok = live[None, :]
            offset = offset[None, :]
            tap = tap[None, :]
        else:
            ok = tl.full([1, BK], True, tl.int1)
        if GROUP % SIDE:
            ok = ok & (first + inner < GROUP)[None, :]
        if MASKED:
            ok = ok & ((bits[:, None] >> tap & 1) != 0)
        left = tl.load(source + offset, mask=ok, other=0.0)
        if BACK:
            block = next_block.to(tl.int64) * (R * C)
            next_block = _entry(perm, i + JOIN, count, k, SIDE, BK)
            if JOIN > 1:
                right = tl.load(values + block[:, None], mask=live[:, None], other=0.0)
            else:
                right = tl.load(values + (block + i % SPLIT * (BK * C)))
        elif JOIN > 1:
            right = tl.trans(tl.load(values + i * (R * C), mask=live[None, :], other=0.0))
        else:
            right = tl.trans(tl.load(values + (i // SPLIT * (R * C) + i % SPLIT * BK)))
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "pixels", "H", "W", "OH", "OW", "PH", "PW"])
def forward(
    x, values, crow_indices, col_indices, row_order, bias, y,
    rows, pixels, H, W, OH, OW, PH, PW,
    IN: tl.constexpr, IPG: tl.constexpr, OUT: tl.constexpr, OPG: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """BM output pixels by one block row; programs of one stretch of pixels are neighbours and share x."""
    BPG: tl.constexpr = (OPG + R - 1) // R
    program = tl.program_id(0)
    row = tl.load(row_order + program % rows)
    group = row // BPG
    begin = tl.load(crow_indices + row)
    count = tl.load(crow_indices + row + 1) - begin
    m = program // rows * BM + tl.arange(0, BM)
    p = tl.minimum(m, pixels - 1)
    top = p // OW % OH * SH - PH
    left = p % OW * SW - PW
    base = ((p // OW // OH).to(tl.int64) * H + top) * W + left
    bits = left
    if MASKED:
        bits = _in_window(top, left, H, W, KH, KW, SH, SW, DH, DW, False)
    acc = _accumulate(
        tl.zeros([BM, R], tl.float32), x + (base * IN + group * IPG)[:, None], values + begin.to(tl.int64) * (R * C),
        col_indices + begin, col_indices, count, bits, W, IN, IPG,
        R, C, BK, KW, SH, SW, DH, DW, False, MASKED, PRECISION,
    )  # fmt: skip
    r = row % BPG * R + tl.arange(0, R)
    o = group * OPG + r
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=r < OPG, other=0.0).to(tl.float32)[None, :]
    ok = (m < pixels)[:, None] & (r < OPG)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * OUT + o[None, :], activate(acc, ACTIVATION).to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["columns", "tiles", "N", "H", "W", "OH", "OW", "PH", "PW", "TOP", "LEFT"])
def backward(
    dy, values, t_crow, t_row, t_perm, t_order, dx,
    columns, tiles, N, H, W, OH, OW, PH, PW, TOP, LEFT,
    IN: tl.constexpr, IPG: tl.constexpr, OUT: tl.constexpr, OPG: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """BM input pixels by the C inputs of one column of blocks.

    Input row h meets tap r at output row (h + PH - r * DH) / SH where that divides. A program's pixels
    therefore share their remainders (h + PH) % SH and (w + PW) % SW, and it visits only the taps that
    match: every STEP_H-th row of taps, every STEP_W-th of a row. dy may be padded: TOP rows, LEFT columns.
    """
    TAPS: tl.constexpr = KH * KW
    NCB: tl.constexpr = (IPG + C - 1) // C
    program = tl.program_id(0)
    column = tl.load(t_order + program % columns)
    group = column // NCB
    tile = program // columns
    rest_h = tile // tiles // SW
    rest_w = tile // tiles % SW
    h0 = (rest_h + SH - PH % SH) % SH
    w0 = (rest_w + SW - PW % SW) % SW
    across = (W - w0 + SW - 1) // SW
    down = (H - h0 + SH - 1) // SH
    pixels = N * down * across
    some = tile % tiles * BM < pixels  # remainders do not all have as many pixels, and some have none
    across = tl.maximum(across, 1)
    down = tl.maximum(down, 1)
    m = tile % tiles * BM + tl.arange(0, BM)
    p = tl.minimum(m, pixels - 1)
    h = h0 + p // across % down * SH
    w = w0 + p % across * SW
    n = (p // across // down).to(tl.int64)
    top = (h + PH) // SH + TOP
    left = (w + PW) // SW + LEFT
    bits = left
    if MASKED:
        bits = _in_window(top, left, OH, OW, KH, KW, SH, SW, DH, DW, True)
    source = dy + (((n * OH + top) * OW + left) * OUT + group * OPG)[:, None]
    acc = tl.zeros([BM, C], tl.float32)
    if SH * SW == 1:
        begin = tl.load(t_crow + column * TAPS)
        count = tl.load(t_crow + column * TAPS + TAPS) - begin
        acc = _accumulate(
            acc, source, values, t_row + begin, t_perm + begin, count, bits, OW, OUT, OPG,
            R, C, BK, KW, SH, SW, DH, DW, True, MASKED, PRECISION,
        )  # fmt: skip
    else:
        r0 = KH
        s0 = KW
        for r in tl.static_range(STEP_H):
            r0 = tl.where(some & (r * DH % SH == rest_h), r, r0)
        for s in tl.static_range(STEP_W):
            s0 = tl.where(s * DW % SW == rest_w, s, s0)
        for kh in range(r0, KH, STEP_H):
            for kw in range(s0, KW, STEP_W):
                segment = t_crow + column * TAPS + kh * KW + kw
                begin = tl.load(segment)
                count = tl.load(segment + 1) - begin
                acc = _accumulate(
                    acc, source, values, t_row + begin, t_perm + begin, count, bits, OW, OUT, OPG,
                    R, C, BK, KW, SH, SW, DH, DW, True, MASKED, PRECISION,
                )  # fmt: skip
    c = column % NCB * C + tl.arange(0, C)
    ok = (m < pixels)[:, None] & (c < IPG)[None, :]
    to = dx + (((n * H + h) * W + w) * IN + group * IPG)[:, None] + c[None, :]
    tl.store(to, acc.to(dx.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pixels", "H", "W", "OH", "OW", "PH", "PW"])
def pixel_table(
    base, bits, pixels, H, W, OH, OW, PH, PW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where in x each output pixel's window begins, in pixels, and its bits; no bits beyond the last pixel."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = tl.minimum(m, pixels - 1).to(tl.int32)
    top = p // OW % OH * SH - PH
    left = p % OW * SW - PW
    tl.store(base + m, (p // OW // OH * H + top) * W + left)
    if MASKED:
        inside = _in_window(top, left, H, W, KH, KW, SH, SW, DH, DW, False)
        tl.store(bits + m, tl.where(m < pixels, inside, 0))


@triton.jit(do_not_specialize=["parts", "pixels", "span", "nnzb", "W"])
def weight(
    dy, x, crow_indices, col_indices, runs, base, bits, out,
    parts, pixels, span, nnzb, W,
    IN: tl.constexpr, IPG: tl.constexpr, OUT: tl.constexpr, OPG: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    J: tl.constexpr, BP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """J neighbouring blocks of a run over ``span`` pixels: ``out [splits, nnzb, R, C]``."""
    NCB: tl.constexpr = (IPG + C - 1) // C
    BPG: tl.constexpr = (OPG + R - 1) // R
    G: tl.constexpr = 256 // C if C < 256 else 1
    program = tl.program_id(0)
    part = program % parts
    split = program // parts
    run = runs + part // (G // J) * 2
    row = tl.load(run)
    first = tl.load(run + 1)
    last = tl.minimum(first + G, tl.load(crow_indices + row + 1))
    first += part % (G // J) * J
    if first >= last:
        return
    k = tl.arange(0, J * C)
    if J == 1:
        entry = tl.load(col_indices + first)
    else:
        entry = tl.max_constancy(tl.load(col_indices + tl.minimum(first + k // C, last - 1)), [C])
    tap = entry // NCB
    offset = (tap // KW * DH * W + tap % KW * DW) * IN + entry % NCB * C
    ok_c = entry % NCB * C + k % C < IPG
    if J > 1:
        tap = tap[:, None]
        offset = offset[:, None]
    group = row // BPG
    r = row % BPG * R + tl.arange(0, R)
    ok_r = r < OPG
    q = tl.arange(0, BP)
    begin = tl.minimum(split * span, pixels)
    end = tl.minimum(begin + span, pixels)
    # x is addressed transposed, [inputs, pixels]: transposing what was loaded keeps sm_80 from copying it async
    source = x + group * IPG + (k % C)[:, None] + offset
    other = dy + (begin + q).to(tl.int64)[:, None] * OUT + (group * OPG + r)[None, :]
    acc = tl.zeros([J * C, R], tl.float32)
    next_base = tl.load(base + begin + q)
    if MASKED:
        next_bits = tl.load(bits + begin + q)
    for p in range(begin, end, BP):
        at = next_base.to(tl.int64) * IN
        next_base = tl.load(base + p + BP + q)
        if MASKED:
            ok_x = (next_bits[None, :] >> tap & 1) != 0
            next_bits = tl.load(bits + p + BP + q)
        else:
            ok_x = (p + q < end)[None, :]
        ok_dy = (p + q < end)[:, None]
        if IPG % C:
            ok_x = ok_x & ok_c[:, None]
        if OPG % R:
            ok_dy = ok_dy & ok_r[None, :]
        acc = tl.dot(
            tl.load(source + at[None, :], mask=ok_x, other=0.0),
            tl.load(other, mask=ok_dy, other=0.0), acc, input_precision=PRECISION,
        )  # fmt: skip
        other += OUT * BP
    # What sticks out of the weight is 0 whatever the products were
    acc = tl.where(ok_c[None, :] & ok_r[:, None], tl.trans(acc), 0.0)
    to = out + (split.to(tl.int64) * nnzb + first) * (R * C)
    to += (k // C * (R * C) + k % C)[None, :] + tl.arange(0, R)[:, None] * C
    tl.store(to, acc.to(out.dtype.element_ty), mask=(k // C < last - first)[None, :])
