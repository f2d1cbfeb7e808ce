"""How a report puts values into words: numbers, shares and names of a summary as text."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

__all__ = ["Summary"]

NONE = "–"
# How the papers call them; others go by their key.
CONTROLS = {"reinit": "re-init", "random": "random mask", "linear": "linearised"}

Summary = dict[str, Any]


def cell(text: Any) -> str:
    """Names come from files: keep them from breaking a table or becoming HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def name(config: dict[str, Any]) -> str:
    model, data = config.get("model"), config.get("data")
    return f"{model or 'a model'} on {data}" if data else str(model or "a model")


def control(name: str) -> str:
    return CONTROLS.get(name, name)


def control_names(summary: Summary) -> list[str]:
    return list(dict.fromkeys(name for row in summary["rounds"] for name in row.get("controls") or {}))


def rate(given: Any) -> str:
    if isinstance(given, list):  # one a round
        each = list(map(rate, given))
        return each[0] if len(set(each)) == 1 else f"[{', '.join(each)}]"
    if not isinstance(given, dict):
        return f"{short(given)} %" if finite(given) else str(given)
    parts = [f"`{pattern}` {short(value)} %" for pattern, value in given.items() if pattern != "*"]
    if "*" not in given:
        return ", ".join(parts)
    return f"{short(given['*'])} %" + (f" ({', '.join(parts)})" if parts else "")


def formats(row: dict) -> str:
    counts = Counter(str(layer.get("format") or "?") for layer in row.get("layers") or ())
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.items()) or NONE


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, spec: str) -> str:
    return format(value, spec) if finite(value) else NONE


def percent(share: Any) -> str:
    """A share as per cent with three digits that matter: 100.0, 51.3, 3.57, 0.0123."""
    if not finite(share):
        return NONE
    value = 100 * share
    if value == 0 or value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.995 else f"{value:.3g}"


def weights(row: dict) -> str:
    """A round's share of weights, with the pattern that it was refilled with."""
    refill = row.get("refill")
    return percent(row["density"]) + (f" as {refill.get('pattern')}" if isinstance(refill, dict) else "")


def short(share: Any) -> str:
    return percent(share).removesuffix(".0").removesuffix(".00")


def accuracy(share: Any) -> str:
    return f"{100 * share:.2f}" if finite(share) else NONE


def times(ratio: Any) -> str:
    return f"{ratio:.2f}x" if finite(ratio) else NONE


def bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"
