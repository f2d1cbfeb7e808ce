"""The plan: which format runs each layer, chosen by measurement, with a reason for every rejected one.

This module times what it is given and remembers the outcome; it knows nothing of modules. A plan is
made when a model is converted, never inside a training step.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import nn

from . import _native, device
from . import format as formats
from ._version import __version__
from .kernels import tuning
from .mask import weight_of
from .prune import why_not
from .times import Times

__all__ = ["Explanation", "LayerPlan", "choose", "explain"]

NOISE = 1.03
"""Times within this ratio are a tie, and a tie goes to the simpler format."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs, and why not otherwise. Times are medians in microseconds."""

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    chosen: str
    us: float | None = None
    dense_us: float | None = None
    work: str = "forward"
    input_shape: tuple[int, ...] = ()
    assumed: bool = False
    forced: bool = False
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Dense time over chosen time, or None where nothing was measured."""
        return self.dense_us / self.us if self.us and self.dense_us else None


def measure(thunks: Mapping[str, Callable[[], object]], seconds: float = 0.02) -> dict[str, float]:
    """Median microseconds of each thunk, warmed and interleaved so that drift hits all alike.

    ``seconds`` is the time to spend on each; at least five rounds are run whatever they take.
    """
    repeats = {}
    for name, thunk in thunks.items():
        with tuning.on():
            thunk()
        device.settle()
        start = time.perf_counter()
        thunk()
        device.settle()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, min(50, int(2e-4 / once)))  # a round of at least 0.2 ms, above timer noise
    samples: dict[str, list[float]] = {name: [] for name in thunks}
    deadline = time.perf_counter() + seconds * len(thunks)
    rounds = 0
    while rounds < 5 or (time.perf_counter() < deadline and rounds < 200):
        rounds += 1
        for name, thunk in thunks.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                thunk()
            device.settle()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) * 1e6 for name, values in samples.items()}


def choose(thunks: Mapping[str, Callable[[], object]], key: str | None = None) -> tuple[str, dict[str, float]]:
    """The fastest thunk's name and all times in us; ``key`` finds and keeps the times in the disk cache."""
    times = _cache.get(key) if key else None
    if times is None or times.keys() != thunks.keys():
        times = {name: max(round(us, 2), 0.01) for name, us in measure(thunks).items()}  # as a later hit reads them
        if key:
            _cache.put(key, times)
    best = min(times.values())
    chosen = next(name for name in formats.names() if name in times and times[name] <= best * NOISE)
    return chosen, dict(times)


def cache_key(where: torch.device, *parts: object) -> str:
    """A cache key that changes with everything a timing depends on: device, threads, versions, ``parts``."""
    build = _native.status()["build"] or {}
    versions = (torch.__version__, __version__, build.get("version"), build.get("schemas"))
    if where.type == "cpu":
        versions += (torch.backends.cpu.get_cpu_capability(), build.get("active_isa"), build.get("machine_code"))
        versions += (torch.get_num_threads(),)
    else:
        versions += (tuning.triton_version(),)
    return "|".join(map(str, (device.describe(where), *versions, *parts)))


def density_bucket(density: float) -> str:
    """Densities within a quarter octave share measurements."""
    return "0" if density <= 0 else str(round(4 * math.log2(density)))


_cache = Times("plans.json")


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: one :class:`LayerPlan` per prunable layer; ``str()`` gives the table."""

    layers: tuple[LayerPlan, ...]

    def to_dict(self) -> dict:
        """JSON-ready: ``{"layers": [{"name", "shape", "density", "chosen", "us", "dense_us", …}]}``."""
        return {"layers": [asdict(layer) | {"speedup": layer.speedup} for layer in self.layers]}

    def __str__(self) -> str:
        if not self.layers:
            return "no linear or convolution layer"
        head = ("layer", "shape", "density", "runs as", "us", "dense us", "speedup", "why not the others")
        rows = [_row(layer) for layer in self.layers]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[-1]]) for r in (head, *rows)]
        notes = sorted({_note(layer) for layer in self.layers} - {""})
        return "\n".join([*lines, *notes])


def _row(layer: LayerPlan) -> tuple[str, ...]:
    def number(value, spec):
        return "-" if value is None else format(value, spec)

    return (
        layer.name or layer.kind,
        "x".join(map(str, layer.shape)),
        f"{layer.density:.4g}",
        layer.chosen + (" (forced)" if layer.forced else ""),
        number(layer.us, ".1f"),
        number(layer.dense_us, ".1f"),
        number(layer.speedup, ".2f") + ("x" if layer.speedup else ""),
        "; ".join(f"{name}: {reason}" for name, reason in layer.rejected.items()) or "-",
    )


def _note(layer: LayerPlan) -> str:
    if layer.us is None:
        return ""
    size = "x".join(map(str, layer.input_shape))
    origin = "assumed, give example_inputs to measure yours" if layer.assumed else "from example_inputs"
    return f"{layer.name or layer.kind}: {layer.work} measured on an input of {size} ({origin})"


def explain(model: nn.Module) -> Explanation:
    """How each linear and convolution layer of ``model`` runs, in how many us, and why not otherwise."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "survivors"):
            plan, share = getattr(module, "plan", None), module.density
            if plan is None or plan.chosen != module.format.name:  # built by hand, or moved since
                kind, shape = type(module).__name__, tuple(module.dense_shape)
                plan = LayerPlan(name, kind, shape, share, module.format.name, forced=True)
            found.append(replace(plan, name=name, density=share))
        elif why_not(module) != "":
            weight = weight_of(module)
            known = weight is not None and not nn.parameter.is_lazy(weight)
            kind, shape = type(module).__name__, tuple(weight.shape) if known else ()
            why = why_not(module) or "no weight of it is pruned"
            found.append(LayerPlan(name, kind, shape, 1.0, "torch", rejected={"sparse": why}))
    return Explanation(tuple(found))
