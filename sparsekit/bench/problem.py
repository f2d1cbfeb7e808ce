"""A case made ready: the layer under its mask, an input, and what every result must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import Pattern
from ..nn import SparseConv2d, SparseLinear, SparseModule
from .cases import Case
from .layers import LAYERS

__all__ = ["Problem", "Thunk", "dense_thunk", "forward_of_linear", "pose", "sparse_thunk", "verdict"]

T = TypeVar("T")
Thunk = Callable[[], Sequence[Tensor]]
"""Does the work once; returns what :attr:`Problem.expected` names, in any memory format or float dtype."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass
class Problem:
    """``dense`` has its pruned weights at 0; ``expected`` are float64: y, dx, dw, or (dx, dw, db) of a step.

    Copies of a problem on other buffers share their weights, whatever a rival makes of them: :meth:`once`.
    """

    case: Case
    dense: nn.Module
    mask: Tensor
    x: Tensor
    dy: Tensor
    expected: tuple[Tensor, ...]
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` returned when a copy of this problem first asked for ``name``."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    @property
    def is_linear(self) -> bool:
        """Whether the layer is linear rather than a convolution."""
        return isinstance(self.dense, nn.Linear)

    @property
    def geometry(self) -> tuple:
        """Stride, padding, dilation and groups of a convolution."""
        return self.dense.stride, self.dense.padding, self.dense.dilation, self.dense.groups


def make_mask(case: Case, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random mask of whole blocks, each surviving with the case's density; of ``nm`` a random 2:4 one."""
    (out, inputs, *kernel), (rows, cols) = shape, case.block
    if case.format == "nm":
        alive = torch.ones(*shape, dtype=torch.bool)
        return Pattern.parse("2:4").nm_mask(torch.rand(*shape, generator=generator), alive)
    mask = torch.rand(-(-out // rows), -(-inputs // cols), *kernel, generator=generator) < case.density
    return mask.repeat_interleave(rows, 0)[:out].repeat_interleave(cols, 1)[:, :inputs]


def pose(case: Case, where: str = "cpu") -> Problem:
    """The problem of a layer's case; the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[case.subject]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = layer.module()
    mask = make_mask(case, dense.weight.shape, generator)
    with torch.no_grad():
        dense.weight.mul_(mask)
    dense = dense.to(where, case.torch_dtype)
    x = torch.randn(layer.input, generator=generator).to(where, case.torch_dtype)
    exact, x64 = _double(dense), x.double().requires_grad_()
    y = exact(x64)
    dy = torch.randn(y.shape, generator=generator).to(where, case.torch_dtype)
    if case.work == "forward":
        expected = (y.detach(),)
    else:
        dx, dw, db = torch.autograd.grad(y, (x64, exact.weight, exact.bias), dy.double())
        dw = dw * mask.to(where)
        expected = {"dx": (dx,), "dw": (dw,), "step": (dx, dw, db)}[case.work]
    return Problem(case, dense, mask, x, dy, expected)


def _double(dense: nn.Module) -> nn.Module:
    copy = type(dense).__new__(type(dense))
    copy.__dict__.update(dense.__dict__)
    copy._parameters = {
        name: nn.Parameter(parameter.detach().double()) for name, parameter in dense._parameters.items()
    }
    return copy


def verdict(got: Sequence[Tensor], problem: Problem, dtype: torch.dtype | None = None, packed=None) -> float:
    """The largest relative error among the results; raises AssertionError when it is too large.

    Entries of a dense weight gradient that the mask prunes are not compared: no dense execution makes them 0.
    """
    mask, worst = problem.mask.to(problem.x.device), 0.0
    names = ("dx", "dw", "db") if problem.case.work == "step" else (problem.case.work,)
    for name, have, want in zip(names, got, problem.expected, strict=True):
        have = torch.as_tensor(have).to(want.device).double()
        if name == "dw":
            have, want = (have, packed(want)) if packed else (have * mask, want)
        error = float((have - want).norm() / want.norm().clamp_min(1e-30))
        most = TOLERANCE[dtype or problem.case.torch_dtype]
        if not error <= most:
            raise AssertionError(f"{name}: Expected the float64 dense result within {most:g}, got {error:.1e}")
        worst = max(worst, error)
    return worst


def forward_of_linear(problem: Problem) -> str | None:
    """Why a library that has nothing else cannot do the work, or None."""
    if not problem.is_linear:
        return "has no convolution"
    return None if problem.case.work == "forward" else "has no gradient for a fixed pattern"


def dense_thunk(problem: Problem, module: nn.Module, x: Tensor, dy: Tensor) -> Thunk:
    """The work by torch's dense kernels: ``module`` is the layer in the memory format or dtype to be timed."""
    work = problem.case.work
    if work in ("forward", "step"):
        return _module_thunk(work, module, x, dy)
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):
        return (lambda: (dy @ weight,)) if work == "dx" else (lambda: (dy.t() @ x,))
    want = (work == "dx", work == "dw", False)
    which = want.index(True)
    rest = (None, *problem.geometry[:3], False, [0, 0], problem.geometry[3], want)
    return lambda: (torch.ops.aten.convolution_backward(dy, x, weight, *rest)[which],)


def sparse_thunk(problem: Problem) -> tuple[SparseModule, Thunk]:
    """The sparse layer of a case and its work; an operator alone is asked of the format."""
    case, x, dy = problem.case, problem.x, problem.dy
    kind = SparseLinear if problem.is_linear else SparseConv2d
    layer = problem.once("sparse", lambda: kind.from_dense(problem.dense, problem.mask, case.format))
    if case.work == "step" or (case.work == "forward" and case.suite != "ops"):
        return layer, _module_thunk(case.work, layer, x, dy)
    layer.derive()
    fmt, values, shape = layer.format, layer.values.detach(), torch.Size(layer.shape)
    index = tuple(layer._buffers[name] for name in fmt.index_names)
    if problem.is_linear:
        bias = layer.bias.detach()
        return layer, {
            "forward": lambda: (fmt.linear(x, values, bias, index, shape),),
            "dx": lambda: (fmt.linear_t(dy, values, index, shape),),
            "dw": lambda: (fmt.sddmm(dy, x, index, shape),),
        }[case.work]
    bias, conv, size = layer.bias.detach(), layer._conv, tuple(x.shape[2:])
    return layer, {
        "forward": lambda: (fmt.conv2d(x, values, bias, index, shape, conv),),
        "dx": lambda: (fmt.conv2d_t(dy, values, index, shape, conv, size),),
        "dw": lambda: (fmt.conv2d_sddmm(dy, x, index, shape, conv),),
    }[case.work]


def _module_thunk(work: str, module: nn.Module, x: Tensor, dy: Tensor) -> Thunk:
    if work == "forward":

        def forward():
            with torch.no_grad():
                return (module(x),)

        return forward
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    wanted = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), wanted, dy)
