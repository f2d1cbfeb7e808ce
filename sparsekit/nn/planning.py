"""Which format each layer of a model gets: candidates, measurement within a budget, and a reason for every other.

Layers that are alike (kind, geometry, input, density bucket, blocks) are measured once. Where the budget does not
last for all, those go first that promise most; the others stay dense and say that they were not measured.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from torch import Tensor, nn

from .. import format as formats
from ..mask import density, is_transposed, weight_of
from ..plan import LayerPlan, best, cache_key, choose, density_bucket, recall
from ..roofline import Product, predict
from .base import SparseModule

__all__ = ["Budget", "Job", "autocast", "fall", "fit", "plan_layers", "thunk"]

_HOPELESS = 1 / 3  # of dense's speed in prediction, which is good to a factor of two or so: not worth a measurement
_CALLS = 7  # of each candidate, that a measurement takes
_ASSUMED_BATCH, _ASSUMED_IMAGE = 64, (16, 32, 32)


class Budget:
    """The seconds that planning may take, counted from now."""

    def __init__(self, seconds: float) -> None:
        if not isinstance(seconds, Real) or not seconds >= 0:
            raise ValueError(f"Expected plan_seconds as a number of at least 0, got {seconds!r}")
        self.seconds, self._start = seconds, time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds that remain, negative when overdrawn."""
        return self.seconds - self.spent


@dataclass
class Job:
    """One layer to plan: ``module`` dense, ``mask`` its survivors, ``x`` its input (None: an assumed one)."""

    name: str
    module: nn.Module
    mask: Tensor
    sparse_class: type[SparseModule]
    x: Tensor | None
    training: bool
    assumed: bool = False
    density: float = 0.0
    key: str = ""
    rejected: dict[str, str] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    packed: dict[str, SparseModule] = field(default_factory=dict)

    def prepare(self) -> None:
        """Find the candidates, what they should take, and the key that alike layers share."""
        self.assumed = self.x is None
        if self.assumed:
            self.x = _assumed_input(self.module)
        x, mask, groups = self.x, self.sparse_class._fold(self.mask), getattr(self.module, "groups", 1)
        self.density = density({self.name: mask})
        product, stored, blocks = self._product(mask), {}, []
        for fmt in map(formats.get, formats.names()):
            reason = fmt.absent(x.device, mask, groups) or fmt.unsupported(mask, groups) or self._beyond(fmt, product)
            if reason:
                self.rejected[fmt.name] = reason
                continue
            stored[fmt.name], block = fmt.stored(mask, groups)
            blocks.append((fmt.name, block, density_bucket(stored[fmt.name] / max(1, mask.numel()))))
        self.predicted = predict(product, stored)
        layout = "nhwc" if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else "rows"
        where = x.device.type
        cast = str(torch.get_autocast_dtype(where)) if torch.is_autocast_enabled(where) else ""
        self.key = cache_key(
            x.device, type(self.module).__name__, self.module.extra_repr(), tuple(mask.shape), tuple(x.shape), layout,
            x.dtype, weight_of(self.module).dtype, x.requires_grad, cast, density_bucket(self.density), blocks,
            self.work,
        )  # fmt: skip

    @property
    def work(self) -> str:
        """What is measured."""
        return "forward + backward" if self.training else "forward"

    def _product(self, mask: Tensor) -> Product:
        x, where, dtype = self.x, self.x.device.type, weight_of(self.module).dtype
        if (axes := len(getattr(self.module, "kernel_size", ()))) == 0:
            places = x.numel() // max(1, mask.shape[1])
        else:
            sides = zip(x.shape[-axes:], self.module.kernel_size, self.module.stride, self.module.dilation, strict=True)
            image = [max(1, (extent - d * (k - 1) + k // 2 * 2) // s) for extent, k, s, d in sides]
            places = math.prod(x.shape[: -axes - 1]) * math.prod(image)
        passes = 1 if not self.training else 2 + x.requires_grad
        dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else dtype
        return Product(places, mask.numel(), x.numel(), places * mask.shape[0], passes, axes > 0, x.device, dtype)

    def _beyond(self, fmt: formats.Format, product: Product) -> str | None:
        if fmt.serves is None or (not self.training and product.places <= fmt.serves):
            return None
        return f"for inference on up to {fmt.serves} rows of input at a time"

    @property
    def gain(self) -> float:
        """Predicted us that the fastest candidate saves."""
        return self.predicted["dense"] - min(self.predicted.values())

    @property
    def cost(self) -> float:
        """Predicted seconds of measuring the candidates that are not hopeless."""
        return _CALLS * 1e-6 * sum(us for us in self.predicted.values() if us * _HOPELESS <= self.predicted["dense"])

    def pack(self, name: str) -> SparseModule:
        """The layer in a format, ready to run as it will."""
        if name not in self.packed:
            self.packed[name] = self.sparse_class.from_dense(self.module, self.mask, name, self.name)
            if self.training and self.x.requires_grad:
                self.packed[name].derive()
        return self.packed[name]

    @property
    def dense_bytes(self) -> int:
        """What the layer holds dense: its parameters, and while it trains their mask, gradient and Adam's moments."""
        weight, bias = weight_of(self.module), self.module.bias
        held = weight.numel() * (4 * weight.element_size() + 1 if self.training else weight.element_size())
        return held + (0 if bias is None else bias.numel() * bias.element_size())

    def oversize(self, name: str) -> str | None:
        """Why a candidate would hold more than dense may: for inference a mask more, where :func:`fit` finds room."""
        sparse = self.pack(name)
        moments = 3 * sparse.values.numel() * sparse.values.element_size() if self.training else 0
        spare = 0 if self.training else self.mask.numel()
        ratio = (sparse.bytes() + moments) / (self.dense_bytes + spare)
        return f"{ratio:.2f}x the memory of dense at density {self.density:.3g}" if ratio > 1 else None

    def measure(self) -> dict[str, float]:
        """Times in us of the candidates that are neither hopeless nor oversize; the rest gets its reason."""
        for name, us in self.predicted.items():
            if name == "dense":
                continue
            if (ratio := self.predicted["dense"] / us) < _HOPELESS:
                self.rejected[name] = f"predicted {ratio:.2g}x dense (roofline), not measured"
            elif reason := self.oversize(name):
                self.rejected[name] = reason
        names = [name for name in self.predicted if name not in self.rejected]
        return choose({name: thunk(self.pack(name), self.x, self.training) for name in names}, self.key)[1]

    def settle(self, times: Mapping[str, float], cached: bool) -> SparseModule:
        """The layer in the format that ``times`` speak for, its plan beside it."""
        times = dict(times)
        while (chosen := best(times)) != "dense" and (reason := self.oversize(chosen)):
            self.rejected[chosen] = reason
            del times[chosen]
        for name in self.predicted.keys() - times.keys() - self.rejected.keys():
            us = self.predicted[name]
            ratio = self.predicted["dense"] / us
            hopeless = f"predicted {ratio:.2g}x dense (roofline), not measured"
            self.rejected[name] = hopeless if ratio < _HOPELESS else self.oversize(name) or "too large at like density"
        for name, us in times.items():
            if name != chosen:
                self.rejected[name] = (
                    f"{us / times[chosen]:.2f}x the time of {chosen}"
                    if name == "dense"
                    else f"{us:.0f} us, {times['dense'] / us:.2f}x dense at density {self.density:.3g}"
                )
        facts = {"us": times[chosen], "dense_us": times["dense"], "cached": cached}
        return self._finish(chosen, **facts)

    def give_up(self, seconds: float) -> SparseModule:
        """The layer dense, because the budget did not last for it."""
        for name, us in self.predicted.items():
            if name != "dense":
                ratio = self.predicted["dense"] / us
                self.rejected[name] = f"not measured, predicted {ratio:.2g}x dense"
        return self._finish("dense", note=f"not measured within plan_seconds={seconds:g}, so it stays dense")

    def _finish(self, chosen: str, **facts) -> SparseModule:
        sparse = self.pack(chosen)
        order = [name for name in formats.names() if name in self.rejected]
        sparse.plan = LayerPlan(
            self.name, type(self.module).__name__, tuple(self.mask.shape), self.density, chosen, work=self.work,
            input_shape=tuple(self.x.shape), assumed=self.assumed, rejected={n: self.rejected[n] for n in order},
            **facts,
        )  # fmt: skip
        self.packed.clear()
        self.x = None
        return sparse


def plan_layers(jobs: Iterable[Job], budget: Budget) -> dict[str, SparseModule]:
    """Each job's layer in its format, by name; measuring stops when the budget is spent."""
    groups: dict[str, list[Job]] = {}
    jobs = list(jobs)
    for job in jobs:
        job.prepare()
        groups.setdefault(job.key, []).append(job)
    done: dict[str, SparseModule] = {}
    missing = []
    for key, alike in groups.items():
        if times := recall(key):
            done |= {job.name: job.settle(times, cached=True) for job in alike}
        else:
            missing.append(alike)
    missing.sort(key=lambda alike: -alike[0].gain * len(alike))
    for alike in _progress(missing):
        if budget.left <= 0 or (alike[0].cost > budget.left and len(alike[0].predicted) > 1):
            done |= {job.name: job.give_up(budget.seconds) for job in alike}
            continue
        times = alike[0].measure()
        done |= {job.name: job.settle(times, cached=False) for job in alike}
    fit(jobs, done)
    return done


def fit(jobs: Iterable[Job], done: Mapping[str, SparseModule]) -> None:
    """Make layers dense, the largest first, until all together hold no more for inference than they do dense.

    One of half density or so may hold more than dense, in order to be faster, while others hold much less.
    """
    jobs = [job for job in jobs if not job.training]
    over = {job.name: done[job.name].bytes() - job.dense_bytes for job in jobs if done[job.name].plan.chosen != "dense"}
    total, dense = sum(over.values()), sum(job.dense_bytes for job in jobs)
    for name in sorted(over, key=lambda name: -over[name]):
        if total <= 0:
            break
        fall(done[name], f"the model would hold {1 + total / dense:.2f}x its dense bytes with it")
        total -= over[name]


def fall(module: SparseModule, why: str) -> None:
    """Make a layer dense again; its plan says why."""
    plan, was = module.plan, module.format.name
    module.set_format("dense")
    rejected = {name: reason for name, reason in plan.rejected.items() if name != "dense"} | {was: why}
    module.plan = replace(plan, chosen="dense", us=plan.dense_us, rejected=rejected)


def thunk(module: nn.Module, x: Tensor, training: bool) -> Callable[[], object]:
    """One forward pass of a layer, or forward and backward, under the autocast in force now."""
    x = x.detach().requires_grad_(x.requires_grad)
    leaves = [p for p in (x, *module.parameters()) if p.requires_grad] if training else []
    cast = autocast(x.device.type)
    if not leaves:

        def forward():
            with torch.no_grad(), cast():
                return module(x)

        return forward
    with torch.no_grad(), cast():
        dy = torch.ones_like(module(x))

    def step():
        with torch.enable_grad():
            with cast():
                y = module(x)
            y.backward(dy)  # not autograd.grad: gradients that nobody else sees are masked where they lie
        for leaf in leaves:
            leaf.grad = None

    return step


def autocast(where: str) -> Callable[[], contextlib.AbstractContextManager]:
    """Makes the autocast that is in force, without its cache of weights, which lives for one step only."""
    if not torch.is_autocast_enabled(where):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(where)
    return lambda: torch.autocast(where, dtype, cache_enabled=False)


def _assumed_input(module: nn.Module) -> Tensor:
    weight = weight_of(module)
    if isinstance(module, nn.Linear) or is_transposed(module):
        size = (_ASSUMED_BATCH, weight.shape[0 if is_transposed(module) else 1])
    elif isinstance(module, nn.Conv1d):
        batch, height, width = _ASSUMED_IMAGE
        size = (batch, module.in_channels, max(height * width, module.dilation[0] * (module.kernel_size[0] - 1) + 1))
    else:
        batch, height, width = _ASSUMED_IMAGE
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        size = (batch, module.in_channels, max(height, reach[0]), max(width, reach[1]))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator).to(weight.device, weight.dtype).requires_grad_()


def _progress(groups: list[list[Job]]) -> Iterable[list[Job]]:
    """A progress bar where there is a terminal and tqdm."""
    if len(groups) < 2 or not sys.stderr.isatty():
        return groups
    try:
        from tqdm import tqdm
    except ImportError:
        return groups
    return tqdm(groups, desc="planning", unit="layer", leave=False)
