"""What only a GPU needs: rivals that run nowhere else, and rotating buffers, so that a call's data has left the L2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..pattern import Pattern
from .problem import Problem, Thunk, forward_of_linear

__all__ = ["clones", "cusparse", "semi_structured", "sets_needed", "tuned_bsr", "two_of_four"]

FEW = 256
"""Positions below which the weight is what must come from memory: then the L2 is emptied before each call."""


def sets_needed(bytes_per_set: int, l2_bytes: int) -> int:
    """Buffers to rotate among, so that one is cold when its turn comes: together over three times the L2."""
    return max(2, min(16, 3 * l2_bytes // max(bytes_per_set, 1) + 1))


def clones(problem: Problem) -> list[Problem]:
    """The problem with as many inputs and gradients as make each cold on its turn; on a CPU itself alone."""
    if not problem.x.is_cuda:
        return [problem]
    size = (problem.x.numel() + problem.dy.numel()) * problem.x.element_size()
    count = sets_needed(size, torch.cuda.get_device_properties(problem.x.device).L2_cache_size)
    return [problem, *(replace(problem, x=problem.x.clone(), dy=problem.dy.clone()) for _ in range(count - 1))]


def _close(got: Tensor, want: Tensor, most: float = 2e-2) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    if not error < most:
        raise AssertionError(f"Expected the dense result within {most:g}, got {error:.1e}")


def two_of_four(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's product (cuSPARSELt) with a random 2:4 weight of that shape and dtype, checked."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = False  # on Hopper only cuSPARSELt is fast
    alive = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    mask = Pattern.parse("2:4").nm_mask(torch.rand_like(weight, dtype=torch.float32), alive)
    dense = torch.randn_like(weight) * mask
    packed = to_sparse_semi_structured(dense)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.nn.functional.linear(x, packed, bias)

    few = torch.randn(64, weight.shape[1], device=weight.device, dtype=weight.dtype)
    _close(run(few), torch.nn.functional.linear(few, dense, bias))
    return run


def semi_structured(p: Problem) -> Thunk | str:
    """2:4 in half precision whatever the row's dtype: the row's own where that is half, else bfloat16."""
    if reason := forward_of_linear(p):
        return reason
    half = p.case.torch_dtype if p.case.torch_dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    x = p.x.to(half)
    run = p.once("2:4", lambda: two_of_four(p.dense.weight.detach().to(half), p.dense.bias.detach().to(half)))
    return lambda: (run(x),)


def tuned_bsr(weight: Tensor, bias: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's own block-sparse product, tuned for inputs like ``x``; ``weight`` is in its BSR layout."""
    import triton.testing
    from torch.sparse._triton_ops import bsr_dense_addmm
    from torch.sparse._triton_ops_meta import tune_bsr_dense_addmm

    wide = bias[:, None].expand(-1, x.shape[0]).contiguous()
    bench = triton.testing.do_bench

    def brief(fn, **_):  # its own half second of warm-up for each try would take minutes
        return bench(fn, warmup=10, rep=30)

    triton.testing.do_bench = brief
    try:
        meta = tune_bsr_dense_addmm(wide, weight, x.t(), store=True)
    finally:
        triton.testing.do_bench = bench

    def run(x: Tensor) -> Tensor:
        return bsr_dense_addmm(wide, weight, x.t(), meta=meta).t()

    with torch.no_grad():
        _close(run(x)[:64], torch.nn.functional.linear(x[:64], weight.to_dense(), bias))
    return run


def cusparse(p: Problem) -> Thunk | str:
    """cuSPARSE's SpMM of float32 and float64, through cupy on torch's stream and memory."""
    if reason := forward_of_linear(p):
        return reason
    if p.case.torch_dtype not in (torch.float32, torch.float64):
        return "through cupy has float32 and float64 only"
    import cupy
    from cupyx.scipy.sparse import csr_matrix

    def lent(tensor: Tensor):
        return cupy.from_dlpack(tensor.detach())

    weight = p.once("cuSPARSE", lambda: csr_matrix(lent(p.dense.weight)))
    bias, x = p.dense.bias.detach(), lent(p.x).T
    return lambda: (torch.from_dlpack(weight @ x).t() + bias,)
