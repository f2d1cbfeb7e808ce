"""The verdict on a ticket: against the dense network and its controls, with intervals over seeds.

Frankle & Carbin (arXiv:1803.03635, section 1) call a ticket winning when it stops no later (least validation
loss) and is at least as accurate as the dense network; arXiv:1912.05671 calls it matching when it loses less
than 0.2 points. Seeds are compared pairwise: a seed's ticket with its own dense network and its own controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, sqrt
from statistics import fmean, stdev
from typing import Any

from .. import words

__all__ = ["Difference", "Verdict", "judge", "study", "verdict_rows", "verdict_table"]

_MATCHING = 0.002  # accuracy a matching ticket may lose
_RANDOM = ("reinit", "random")  # the others keep something of the ticket's weights
_LEARNT = 0.1  # of what the dense network gains over chance: less is collapse


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds with its confidence interval; with one seed the ends are infinite."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """``word`` is one of ``winning``, ``matching``, ``below dense``, ``no better than random``, ``collapsed``.

    ``accuracy`` and ``stop`` are ticket less dense (shares, iterations), ``controls`` ticket less control in
    accuracy, ``stops`` in iterations; ``certain`` says that the intervals, not just the means, bear the word out.
    """

    word: str
    certain: bool
    seeds: int
    accuracy: Difference
    stop: Difference
    controls: dict[str, Difference]
    stops: dict[str, Difference]

    def __str__(self) -> str:
        return self.word if self.certain else f"{self.word} (uncertain)"


def judge(
    dense: Sequence[Mapping[str, Any]],
    ticket: Sequence[Mapping[str, Any]],
    controls: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    *,
    classes: int = 10,
    empty_layers: Sequence[str] = (),
    confidence: float = 0.95,
) -> Verdict:
    """The verdict on a ticket from its runs, one per seed and in the same order everywhere.

    Args:
        dense, ticket, controls: of each run ``test_accuracy`` at early stop, in [0, 1], and
            ``early_stop_iteration``, the iteration of least validation loss, found afterwards.
        classes: 1 / classes is chance. ``empty_layers``: see :func:`sparsekit.collapse.collapsed`.
        confidence: of the intervals (Student's t over the seeds' differences; needs scipy from two seeds on).

    The word goes by means. *collapsed*: a layer is empty, or less than a tenth of what dense learnt over chance is
    left. *no better than random*: less than 0.2 points above ``reinit`` or ``random`` and stops no earlier.
    *winning*: no less accurate and stops no later than dense. *matching*: loses at most 0.2 points. *below dense*
    otherwise. With one seed nothing is certain but an empty layer.
    Raises: ValueError on runs that cannot be paired; ImportError without scipy.
    """
    controls = controls or {}
    for name, runs in {"ticket": ticket, **controls}.items():
        if not runs or len(runs) != len(dense):
            raise ValueError(f"{name}: Expected one run for each of {len(dense)} dense ones, got {len(runs)}")
    accuracy = _difference(ticket, dense, "test_accuracy", confidence)
    stop = _difference(ticket, dense, "early_stop_iteration", confidence)
    against = {name: _difference(ticket, runs, "test_accuracy", confidence) for name, runs in controls.items()}
    stops = {name: _difference(ticket, runs, "early_stop_iteration", confidence) for name, runs in controls.items()}
    random = [(against[name], stops[name]) for name in controls if name in _RANDOM]
    better = all(gain.low > 0 or sooner.high < 0 for gain, sooner in random)
    level = [gain for gain, sooner in random if gain.mean < _MATCHING and sooner.mean >= 0]

    learnt = _mean(dense, "test_accuracy") - 1 / classes
    if empty_layers or _mean(ticket, "test_accuracy") - 1 / classes < _LEARNT * learnt:
        word, certain = "collapsed", bool(empty_layers) or accuracy.high < 0
    elif level:
        word, certain = "no better than random", any(gain.high < _MATCHING for gain in level)
    elif accuracy.mean >= 0 and stop.mean <= 0:
        word, certain = "winning", better and accuracy.low >= -_MATCHING and stop.high <= 0
    elif accuracy.mean >= -_MATCHING:
        word, certain = "matching", better and accuracy.low >= -_MATCHING
    else:
        word, certain = "below dense", better and accuracy.high < 0
    return Verdict(word, certain, len(dense), accuracy, stop, against, stops)


def study(summaries: Sequence[Mapping[str, Any]], classes: int = 10, confidence: float = 0.95) -> list[dict[str, Any]]:
    """One row per round over the summaries of the same search with several seeds, JSON-ready but for infinities.

    ``{"round", "density", "dense", "ticket", "controls": {name: …}, "verdict": {…}}``; the values are mean
    accuracies; a refilled round has ``"refill": {"pattern": …}`` too. Raises ValueError when the searches have other
    rounds or lack what :func:`judge` needs.
    """
    rounds = [summary["rounds"] for summary in summaries]
    if not rounds or any([row["round"] for row in rows] != list(range(len(rounds[0]))) for rows in rounds):
        raise ValueError("Expected summaries of the same rounds, the dense one included, got others")
    found = []
    for number in range(1, len(rounds[0])):
        dense, ticket = [rows[0] for rows in rounds], [rows[number] for rows in rounds]
        for row in (*dense, *ticket):
            if row.get("test_accuracy") is None or row.get("early_stop_iteration") is None:
                raise ValueError(f"round {row['round']}: Expected an accuracy and an early stop, got none")
        names = [name for name in ticket[0].get("controls") or {} if all(name in row["controls"] for row in ticket)]
        controls = {name: [row["controls"][name] for row in ticket] for name in names}
        empty = [layer["name"] for row in ticket for layer in row["layers"] if layer["density"] == 0]
        refill = ticket[0].get("refill")
        verdict = judge(dense, ticket, controls, classes=classes, empty_layers=empty, confidence=confidence)
        found.append(
            {
                "round": number,
                "density": _mean(ticket, "density"),
                "dense": _mean(dense, "test_accuracy"),
                "ticket": _mean(ticket, "test_accuracy"),
                "controls": {name: _mean(runs, "test_accuracy") for name, runs in controls.items()},
                "verdict": asdict(verdict),
            }
            | ({"refill": {"pattern": refill.get("pattern")}} if isinstance(refill, Mapping) else {})
        )
    return found


def verdict_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """:func:`verdict_rows` as aligned text."""
    lines = verdict_rows(rounds)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def verdict_rows(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of :func:`study` in words under a head: mean accuracies, early stop against dense, the verdict."""
    names = list(dict.fromkeys(name for row in rounds for name in row["controls"]))
    head = ["weights %", "dense %", "ticket %", *(f"{name} %" for name in names), "ticket - dense", "stops", "verdict"]
    lines = []
    for row in rounds:
        verdict, controls = row["verdict"], [row["controls"].get(name) for name in names]
        lines.append(
            [
                words.weights(row),
                *(
                    f"{100 * value:.2f}" if value is not None else ""
                    for value in (row["dense"], row["ticket"], *controls)
                ),
                _interval(verdict["accuracy"], 100, ".2f"),
                _interval(verdict["stop"], 1, ".0f"),
                verdict["word"] + ("" if verdict["certain"] else " (uncertain)"),
            ]
        )
    return [head, *lines]


def _interval(difference: Mapping[str, float], scale: float, spec: str) -> str:
    text = format(scale * difference["mean"], f"+{spec}")
    if difference["high"] == inf:
        return text
    return f"{text} [{format(scale * difference['low'], spec)}, {format(scale * difference['high'], spec)}]"


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return fmean(run[key] for run in runs)


def _difference(
    runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], key: str, confidence: float
) -> Difference:
    differences = [run[key] - other[key] for run, other in zip(runs, others, strict=True)]
    mean = fmean(differences)
    if len(differences) < 2:
        return Difference(mean, -inf, inf)
    half = _t(confidence, len(differences) - 1) * stdev(differences) / sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


def _t(confidence: float, freedom: int) -> float:
    try:
        from scipy.stats import t
    except ImportError:
        raise ImportError("Expected scipy for intervals over seeds, got none; pip install scipy") from None
    return float(t.ppf((1 + confidence) / 2, freedom))
