"""Times that can be compared: warmed, interleaved, as percentiles; and the rates that no kernel here exceeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ..clock import Events, Wall, race
from ..kernels import tuning

__all__ = ["Spread", "limit", "probe", "spreads"]


class Spread(NamedTuple):
    """Microseconds of a call: a fifth of the samples lie below ``p20``, a fifth above ``p80``."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The percentiles of at least two samples."""
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


def spreads(
    thunks: Mapping[str, Callable[[], object]], seconds: float, clock: Wall | Events | None = None
) -> dict[str, Spread]:
    """The times of each thunk, a round of all at a time so that drift hits all alike.

    ``seconds`` is the time to spend on each; at least nine rounds are run, but for thunks of a second or more.
    """
    with tuning.on():
        samples = race(thunks, seconds, least=9, most=400, slow=1.0, clock=clock)
    return {name: Spread.of([sample.us for sample in found]) for name, found in samples.items()}


def probe(where: str = "cpu") -> dict[str, Any]:
    """The highest rates seen here, with the threads of now: ``{"flops": {dtype: FLOP/s}, "bytes": {size: B/s}}``.

    FLOP/s of dense and of block products that fit the caches; bytes per second of copies (read plus
    written) whose working set is ``size`` bytes. About two seconds.
    """
    flops: dict[str, float] = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        thunks, work = {}, 2 * 512**3
        a, b = (torch.randn(512, 512, device=where).to(dtype) for _ in range(2))
        thunks["product"] = lambda a=a, b=b: a @ b
        if where == "cpu":
            thunks["blocks"] = _blocks(dtype)
        flops[str(dtype).removeprefix("torch.")] = work / _fastest(thunks, 0.1)
    rates = {}
    for size in (1 << 18, 1 << 21, 1 << 24, 1 << 28):
        source, to = torch.ones(size // 8, device=where), torch.empty(size // 8, device=where)
        rates[str(size)] = size / _fastest({"copy": partial(to.copy_, source)}, 0.05)
    return {"flops": flops, "bytes": rates, "threads": torch.get_num_threads()}


def _fastest(thunks: Mapping[str, Callable[[], object]], seconds: float) -> float:
    """Seconds of the fastest call of all: a limit is what was seen once, however busy the machine was otherwise."""
    samples = race(thunks, seconds, least=9, most=400, slow=1.0)
    return min(sample.us for found in samples.values() for sample in found) * 1e-6


def _blocks(dtype: torch.dtype) -> Callable[[], object]:
    from ..nn import SparseLinear

    layer = SparseLinear(512, 512, bias=False, dtype=dtype, format="bsr")
    x = torch.randn(512, 512).to(dtype)

    def product():
        with torch.no_grad():
            return layer(x)

    return product


def limit(rates: Mapping[str, Any], dtype: str, flops: int, moved: int) -> tuple[str, float]:
    """What bounds a kernel of so many FLOPs and bytes moved, ``flops`` or ``bytes``, and the us it sets."""
    sizes = sorted(map(int, rates["bytes"]))
    fits = next((size for size in sizes if moved <= size), sizes[-1])
    by = {
        "flops": flops / rates["flops"].get(dtype, rates["flops"]["float32"]) * 1e6,
        "bytes": moved / rates["bytes"][str(fits)] * 1e6,
    }
    what = max(by, key=by.__getitem__)
    return what, by[what]
