"""How fast multiprocessors read what lies in L2: the number that block-sparse kernels live on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK, _BYTES = 8192, 16 * 2**20  # elements of a load, bytes of the buffer: well inside L2


@triton.jit
def _read(x, y, chunks, rounds, CHUNK: tl.constexpr):
    at = tl.program_id(0) * 7 % chunks  # programs start apart, so that no line is everyone's first
    total = tl.zeros((CHUNK,), tl.float32)
    for _ in range(rounds):
        total += tl.load(x + at * CHUNK + tl.arange(0, CHUNK), cache_modifier=".cg")
        at = (at + 1) % chunks
    tl.store(y + tl.program_id(0), tl.sum(total))  # so that the loads are not dropped


def reader(where: torch.device, programs: int, rounds: int = 512):
    """A thunk that reads one resident buffer again and again, and the bytes that one call reads."""
    x = torch.ones(_BYTES // 4, device=where)
    y = torch.empty(programs, device=where)
    chunks = x.numel() // _CHUNK
    return lambda: _read[(programs,)](x, y, chunks, rounds, CHUNK=_CHUNK, num_warps=8), programs * rounds * _CHUNK * 4
