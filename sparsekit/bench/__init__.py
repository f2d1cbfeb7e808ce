"""Benchmarks: sparse layers against the strongest dense execution and other runtimes, interleaved in one run.

A row exists only if what was timed agrees with a float64 dense product. ``ratio`` is the best dense time over
the sparse time, so below 1 sparse loses. Losses are rows like any other.
"""

from .cases import SUITES, Case, select
from .facts import environment
from .layers import LAYERS, Layer
from .runner import run, run_case

__all__ = ["LAYERS", "SUITES", "Case", "Layer", "environment", "run", "run_case", "select"]
