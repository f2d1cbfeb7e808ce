"""Schedules: how many survivors each round of a search keeps, as the rates that lead there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

__all__ = ["KINDS", "check_rates", "schedule"]

KINDS = ("geometric", "cubic", "linear", "one-shot")

Rate = float | Mapping[str, float]


def schedule(density: Rate, rounds: int = 12, kind: str = "geometric") -> list[Rate]:
    """Rates for ``tickets(rate=...)``, one per round, that end at ``density``.

    Args:
        density: share of weights that survives in the end, in [0, 1]; per layer as a dict of fnmatch patterns.
        rounds: pruning rounds after the dense one; ``kind="one-shot"`` takes one, whatever is said here.
        kind: densities d_i of round i of n, d the last: ``"geometric"`` d^(i/n), the same rate every round
            (arXiv:1803.03635); ``"cubic"`` d + (1 - d)(1 - i/n)^3, much at first (Zhu & Gupta,
            arXiv:1710.01878); ``"linear"``; ``"one-shot"``.

    Returns: the share of the survivors to remove in each round. Raises: ValueError on bad arguments.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected a schedule of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"Expected rounds as a whole number of at least 1, got {rounds!r}")
    rounds = 1 if kind == "one-shot" else rounds
    if isinstance(density, Mapping):
        each = {pattern: schedule(share, rounds, kind) for pattern, share in density.items()}
        return [{pattern: rates[i] for pattern, rates in each.items()} for i in range(rounds)]
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 <= density <= 1:
        raise ValueError(f"Expected a density between 0 and 1, got {density!r}")
    if kind == "geometric" and density == 0:
        raise ValueError("Expected a density above 0 for a geometric schedule, got 0")
    if kind in ("geometric", "one-shot"):
        return [1 - density ** (1 / rounds)] * rounds
    power = 3 if kind == "cubic" else 1
    left = [density + (1 - density) * (1 - i / rounds) ** power for i in range(rounds + 1)]
    return [1 - after / before if before else 0.0 for before, after in zip(left, left[1:], strict=False)]


def check_rates(rate: Rate | Sequence[Rate], rounds: int) -> list[Rate]:
    """The rate of each round; raises ValueError when a list of them has another length."""
    if isinstance(rate, Sequence) and not isinstance(rate, str):
        if len(rate) != rounds:
            raise ValueError(f"Expected a rate for each of {rounds} rounds, got {len(rate)}")
        return list(rate)
    return [rate] * rounds
