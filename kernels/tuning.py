"""Which of a GPU kernel's few launch configurations runs: the default, or the one that measured fastest.

Measuring happens only where somebody asked for it: inside ``with tuning.on():``, which planning enters
before it starts its clocks. Everywhere else (a training step, a CUDA graph's capture, a compiled graph)
the configuration measured earlier for the same kernel, shape class, device and versions is taken from the
disk cache, or else the first of the list, which is good untuned. ``SPARSEKIT_AUTOTUNE=0`` always takes
the first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch

from sparsekit import device
from sparsekit._version import __version__
from sparsekit.times import Times

__all__ = ["choose", "on", "triton_version"]

_ROUNDS = 5
_ROUND_US = 300.0  # long against the resolution of an event
_asked: ContextVar[bool] = ContextVar("tuning", default=False)
_times = Times("tuning.json")


@contextlib.contextmanager
def on() -> Iterator[None]:
    """Let :func:`choose` measure what it has not measured before."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def choose(
    kernel: str, key: tuple, configs: Sequence[dict], launch: Callable[[dict], object], where: torch.device
) -> dict:
    """One of ``configs``, dicts of JSON scalars of which the first is the default.

    Args: ``kernel`` and ``key`` name the kernel and its shape class, ``launch(config)`` runs the kernel
    once; it is called only while measuring. A configuration that does not launch is never chosen.
    """
    if len(configs) == 1 or where.type != "cuda" or os.environ.get("SPARSEKIT_AUTOTUNE") == "0":
        return configs[0]
    memo = (kernel, key, where, os.environ.get("SPARSEKIT_CACHE"))
    config, measured, count = _chosen.get(memo, (None, False, 0))
    if count != len(configs) or config not in configs or (_asked.get() and not measured):
        config, measured = _look_up(kernel, key, configs, launch, where)
        _chosen[memo] = config, measured, len(configs)
    return config


_chosen: dict[tuple, tuple[dict, bool, int]] = {}
"""``{kernel and shape class: (configuration, whether it was measured, of how many)}``: every launch asks."""


def _look_up(kernel, key, configs, launch, where) -> tuple[dict, bool]:
    names = {json.dumps(config, sort_keys=True): config for config in configs}
    entry = f"{_place(where)}|{kernel}|{'|'.join(map(str, key))}"
    times = _times.get(entry)
    if times is None or times.keys() != names.keys():
        if not _asked.get() or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return configs[0], False
        times = _measure({name: functools.partial(launch, config) for name, config in names.items()})
        _times.put(entry, times)
    return names[min(times, key=times.get)], True


@functools.cache
def triton_version() -> str:
    """The installed Triton's version, or ``"none"``."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _place(where: torch.device) -> str:
    return "|".join((device.describe(where), torch.__version__, triton_version(), __version__))


_FAILED = 1e12  # us: a configuration that this device cannot launch, remembered so that it is not tried again


def _measure(launches: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of each launch, warmed and interleaved."""
    repeats = {}
    for name, run in launches.items():
        with contextlib.suppress(Exception):  # too much shared memory, say: the others remain
            run()
            torch.cuda.synchronize()
            repeats[name] = max(1, min(50, int(_ROUND_US / max(_clock(run, 1), 1.0))))
    if not repeats:
        next(iter(launches.values()))()  # raises what is wrong with all of them
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(_ROUNDS):
        for name, count in repeats.items():
            samples[name].append(_clock(launches[name], count))
    medians = {name: max(round(statistics.median(values), 3), 1e-3) for name, values in samples.items()}
    return {name: medians.get(name, _FAILED) for name in launches}


def _clock(run: Callable[[], object], count: int) -> float:
    """Microseconds of one run, by events around ``count`` of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count
