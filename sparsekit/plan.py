"""The plan: which format runs each layer, chosen by measurement, with a reason for every rejected one.

This module times what it is given and remembers the outcome; it knows nothing of modules. A plan is
made when a model is converted, never inside a training step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch

from . import _native, _nodes, device
from . import format as formats
from ._version import __version__
from .clock import race
from .explanation import Explanation, LayerPlan, ModelPlan, explain
from .kernels import tuning
from .times import Times

__all__ = [
    "NOISE", "Explanation", "LayerPlan", "ModelPlan", "best", "cache_key", "choose", "density_bucket", "explain",
    "measure", "recall", "remember",
]  # fmt: skip

NOISE = 1.03
"""Times within this ratio are a tie, and a tie goes to the simpler format."""
_HOPELESS = 3.0


def measure(
    thunks: Mapping[str, Callable[[], object]], seconds: float = 0.02, hopeless: float = math.inf,
    of: Callable[[Iterable[float]], float] = statistics.median,
) -> dict[str, float]:  # fmt: skip
    """Microseconds of each thunk, warmed and interleaved so that drift hits all alike: the median, or ``of`` of all.

    ``seconds`` is the time to spend on each; at least five rounds are run, three where a call takes 20 ms.
    A thunk of 1 ms or more that is ``hopeless`` times slower than the fastest when first called is called no more.
    """
    with tuning.on():
        samples = race(thunks, seconds, hopeless=hopeless)
    return {name: of(sample.us for sample in found) for name, found in samples.items()}


def choose(thunks: Mapping[str, Callable[[], object]], key: str | None = None) -> tuple[str, dict[str, float]]:
    """The fastest thunk's name and all times in us; ``key`` finds and keeps the times in the disk cache."""
    times = recall(key) if key else None
    if times is None or times.keys() != thunks.keys():
        times = remember(key, measure(thunks, hopeless=_HOPELESS))
    return best(times), times


def best(times: Mapping[str, float]) -> str:
    """The fastest format's name, the simplest of those that are as fast but for noise."""
    least = min(times.values())
    return next(name for name in formats.names() if name in times and times[name] <= least * NOISE)


def recall(key: str) -> dict[str, float] | None:
    """The times in us that were measured under a key, or None."""
    times = _cache.get(key)
    return None if times is None else dict(times)


def remember(key: str | None, times: Mapping[str, float]) -> dict[str, float]:
    """Keep times under a key; returns them as a later :func:`recall` will."""
    times = {name: max(round(us, 2), 0.01) for name, us in times.items()}
    if key:
        _cache.put(key, times)
    return times


def cache_key(where: torch.device, *parts: object) -> str:
    """A cache key that changes with everything a timing depends on: device, threads, versions, ``parts``."""
    build = _native.status()["build"] or {}
    versions = (torch.__version__, __version__, build.get("version"), build.get("schemas"), _native.stamp())
    if where.type == "cpu":
        versions += (torch.backends.cpu.get_cpu_capability(), build.get("active_isa"), build.get("machine_code"))
        versions += (torch.get_num_threads(), _nodes.status()["loaded"])
    else:
        versions += (tuning.triton_version(),)
    return "|".join(map(str, (device.describe(where), *versions, *parts)))


def density_bucket(density: float) -> str:
    """Densities within a quarter octave share measurements."""
    return "0" if density <= 0 else str(round(4 * math.log2(density)))


_cache = Times("plans.json")
