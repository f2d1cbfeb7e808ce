"""One layer of ``gpu_bench.py`` at work: its mask, its inputs, its passes, and how far they are from float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_cases import Case, Layer
from torch import Tensor, nn

from sparsekit import Pattern
from sparsekit.nn import SparseModule

Run = Callable[[int], object]
"""Does the work once on the input set of that number."""


class Setup(NamedTuple):
    """One layer under one mask: dense and sparse modules of the same weight, and rotating inputs and gradients."""

    layer: Layer
    dense: nn.Module
    sparse: SparseModule
    mask: Tensor
    xs: list[Tensor]
    dys: list[Tensor]


def mask_of(case: Case, shape: tuple[int, ...], where: torch.device) -> Tensor:
    """A random mask of the case's pattern, on ``where``: exactly ``round(density * blocks)`` blocks survive."""
    generator = torch.Generator().manual_seed(1)
    if case.format == "nm":
        pattern = Pattern.parse("2:4")
        scores = torch.rand(shape, generator=generator)
        return pattern.nm_mask(scores, torch.ones(shape, dtype=torch.bool)).to(where)
    rows, cols = case.block
    blocks = -(-shape[0] // rows) * torch.Size(shape[2:]).numel() * -(-shape[1] // cols)
    keep = torch.zeros(blocks, dtype=torch.bool)
    keep[torch.randperm(blocks, generator=generator)[: max(1, round(case.density * blocks))]] = True
    return Pattern.parse(f"block:{rows}x{cols}").expand(keep, torch.Size(shape)).to(where)


def runner(module: nn.Module, xs: list[Tensor], dys: list[Tensor], work: str) -> Run:
    """The work of a module as a thunk; for ``dx`` and ``dw`` the forward pass is done beforehand."""
    weight = module.values if isinstance(module, SparseModule) else module.weight
    if work == "forward":

        def forward(i):
            with torch.no_grad():
                return module(xs[i])

        return forward
    inputs = [x.detach().requires_grad_(work != "dw") for x in xs]
    if work == "step":
        return lambda i: torch.autograd.grad(module(inputs[i]), [inputs[i], weight, module.bias], dys[i])
    weight.requires_grad_(work == "dw")
    module.bias.requires_grad_(False)
    try:
        outputs = [module(x) for x in inputs]
    finally:
        weight.requires_grad_()
        module.bias.requires_grad_()
    wanted = inputs if work == "dx" else [weight] * len(inputs)
    return lambda i: torch.autograd.grad(outputs[i], wanted[i], dys[i], retain_graph=True)


@torch.no_grad()
def error_of(work: str, run: Run, setup: Setup) -> float:
    """``‖y - ref‖ / ‖ref‖`` against float64, on a slice of set 0; the memory that results land in held NaN."""
    x, dy, weight = setup.xs[0], setup.dys[0], setup.dense.weight.detach().double()
    torch.backends.cudnn.benchmark, before = False, torch.backends.cudnn.benchmark  # float64 runs once
    try:
        return _error_of(work, run, setup, x, dy, weight)
    finally:
        torch.backends.cudnn.benchmark = before


def _error_of(work: str, run: Run, setup: Setup, x: Tensor, dy: Tensor, weight: Tensor) -> float:
    poison = [torch.full_like(t, torch.nan) for t in (x, dy, setup.sparse.values)]
    del poison  # back to the allocator, which gives it out again
    with torch.enable_grad():
        result = run(0)
    result = (result,) if work == "forward" else result
    linear = setup.layer.kind == "linear"
    some = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], 256 if linear else 2), device=x.device).long()
    outs = torch.linspace(0, dy.shape[1] - 1, min(dy.shape[1], 64), device=x.device).long()

    def forward(y):
        a, bias = x[some].double(), setup.dense.bias.double()
        return y[some], F.linear(a, weight, bias) if linear else F.conv2d(a, weight, bias, padding=1)

    def dx(grad):
        d = dy[some].double()
        if linear:
            return grad[some], d @ weight
        return grad[some], torch.nn.grad.conv2d_input(x[some].shape, weight, d, padding=1)

    def dw(grad):
        index = setup.sparse._saved_index()
        grad = setup.sparse.format.scatter(grad, index, torch.Size(setup.sparse.shape))[outs]
        d = dy[:, outs].double()
        full = d.t() @ x.double() if linear else torch.nn.grad.conv2d_weight(x.double(), grad.shape, d, padding=1)
        return grad, full * setup.mask[outs]

    def dbias(grad):
        return grad, dy.double().sum([i for i in range(dy.dim()) if i != 1])

    checks = {"forward": [forward], "dx": [dx], "dw": [dw], "step": [dx, dw, dbias]}[work]
    worst = 0.0
    for check, tensor in zip(checks, result, strict=True):
        got, exact = check(tensor)
        error = float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))
        if not error <= worst:  # NaN is the worst
            worst = error
    return worst
