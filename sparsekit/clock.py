"""The clocks: all times that are compared, in planning and in benchmarks, are taken here, in turns."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from . import device

__all__ = ["Events", "Sample", "Wall", "graphed", "race", "rotating"]

Thunk = Callable[[], object]
_ROUND_US = 200.0  # of a cheap thunk's turn: above the timer's noise
_SLOW_US = 1e5  # where the fastest takes so long, warm caches are little to it: they hold what tens of ms read


class Sample(NamedTuple):
    """Microseconds of one call: on the device, and of the host that made it."""

    us: float
    host_us: float


class Wall:
    """Wall clock around calls and the wait for the device.

    More than one call follow one that is not timed: what the rival before left in the caches is not their affair.
    A thunk that is run elsewhere may have an attribute ``timed``: it makes so many calls and returns the seconds.
    """

    settling = 0

    def round(self, turns: Sequence[tuple[Thunk, int]]) -> list[Sample]:
        """A sample for each thunk, the mean of so many calls."""
        return [self._turn(*turn) for turn in turns]

    def _turn(self, thunk: Thunk, count: int) -> Sample:
        if (timed := getattr(thunk, "timed", None)) is not None:
            us = timed(count) / count * 1e6
        else:
            if count > 1:
                thunk()
            start = time.perf_counter()
            for _ in range(count):
                thunk()
            device.settle()
            us = (time.perf_counter() - start) / count * 1e6
        return Sample(us, us)


class Events:
    """CUDA events around calls that are queued while the GPU sleeps, so that it never waits for the host.

    ``flush`` empties the L2 before every call, for work whose rotating buffers are too small to do it.
    """

    settling = 2  # rounds until the card's frequency and the length of the queue are steady
    _QUEUE_US = 50000.0  # the longest sleep: about what fits the queue of launches

    def __init__(self, flush: bool = False) -> None:
        self.flush = flush
        self._ahead_us = 20000.0
        self._other: torch.Tensor | None = None

    def round(self, turns: Sequence[tuple[Thunk, int]]) -> list[Sample]:
        """A sample for each thunk, of one call whatever number is asked: its data is cold."""
        if self.flush and self._other is None:
            self._other = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # several times any L2
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
        host = []
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self._ahead_us * 2000))  # cycles, at about 2 GHz
        for (thunk, _), (start, end) in zip(turns, pairs, strict=True):
            begun = time.perf_counter()
            if self.flush:
                self._other.zero_()
            start.record()
            thunk()
            end.record()
            host.append((time.perf_counter() - begun) * 1e6)
        torch.cuda.synchronize()
        self._ahead_us = min(1.5 * sum(host) + 100, self._QUEUE_US)
        return [Sample(start.elapsed_time(end) * 1e3, us) for (start, end), us in zip(pairs, host, strict=True)]


def race(
    thunks: Mapping[str, Thunk], seconds: float, *, least: int = 5, most: int = 200, slow: float = 0.02,
    hopeless: float = math.inf, clock: Wall | Events | None = None,
) -> dict[str, list[Sample]]:  # fmt: skip
    """Samples of each thunk, warmed, a round of all at a time so that drift hits all alike, each round in another
    order (the same in every run): small calls take several us more or less by what ran before them.

    ``seconds`` is the time to spend on each; at least ``least`` rounds are run, or half of them where a call takes
    ``slow`` seconds, and at most ``most``. A thunk of 1 ms or more that is ``hopeless`` times slower than the fastest
    when first called is called no more.
    """
    clock, wall = clock or Wall(), Wall()
    samples: dict[str, list[Sample]] = {}
    for name, thunk in thunks.items():
        thunk()
        device.settle()
        samples[name] = wall.round([(thunk, 1)])
    first = {name: max(found[0].us, 0.1) for name, found in samples.items()}
    racing = [name for name, us in first.items() if us <= max(hopeless * min(first.values()), 1e3)]
    once = 2 if min(first.values()) < _SLOW_US else 1
    repeats = {name: max(once, min(50, int(_ROUND_US / us))) for name, us in first.items()}
    if max(first[name] for name in racing) >= slow * 1e6:
        least //= 2  # and the first call counts
    else:
        samples |= {name: [] for name in racing}  # a first call of few microseconds tells little
    deadline = time.perf_counter() + seconds * len(racing)
    rounds, order = 0, random.Random(0)
    while rounds < least + clock.settling or (time.perf_counter() < deadline and rounds < most):
        rounds += 1
        names = order.sample(racing, len(racing))
        found = clock.round([(thunks[name], repeats[name]) for name in names])
        if rounds > clock.settling:
            for name, sample in zip(names, found, strict=True):
                samples[name].append(sample)
    return samples


def rotating(thunks: Sequence[Thunk]) -> Thunk:
    """The same work on several buffers: every call runs the next of ``thunks``, whose data has left the caches."""
    if len(thunks) == 1:
        return thunks[0]
    turn = 0

    def run() -> object:
        nonlocal turn
        turn += 1
        return thunks[(turn - 1) % len(thunks)]()

    return run


def graphed(thunk: Thunk) -> Thunk:
    """The thunk's launches as one CUDA graph: the host's share is a replay. Raises where they cannot be captured.

    As torch asks: warmed on a stream of its own first. The result is that of the capture, in the same memory.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            thunk()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = thunk()

    def replay() -> object:
        graph.replay()
        return result

    return replay
