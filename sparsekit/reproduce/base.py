"""What every recipe shares: its claims with the papers' numbers beside ours, and the table they end in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import device
from ..files import read_json, write_json

__all__ = ["RECIPES", "SCALES", "Check", "Setting", "interval", "markdown", "recipe", "reproduce", "rows", "table"]

SCALES = ("smoke", "short", "paper")


@dataclass(frozen=True)
class Check:
    """One claim: what the paper says, what was found, and whether that is within the stated tolerance.

    ``passed`` is None where a scale is too small to decide; such a claim is shown and not counted.
    """

    claim: str
    paper: str
    found: str
    passed: bool | None

    @property
    def word(self) -> str:
        return {True: "PASS", False: "FAIL", None: "too small"}[self.passed]


@dataclass(frozen=True)
class Setting:
    """How a recipe is to run: ``scale``, the directory ``out`` of its own, where data lie, seeds."""

    scale: str
    out: Path
    data_dir: Path | None = None
    seeds: int | None = None
    device: str = "cpu"

    def pick(self, smoke: Any, short: Any, paper: Any) -> Any:
        """The value for this scale."""
        return {"smoke": smoke, "short": short, "paper": paper}[self.scale]

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives, JSON values, kept as ``OUT/parts/NAME.json``: an interrupted run goes on there."""
        path = self.out / "parts" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, work())
        return read_json(path)

    def check(self, claim: str, paper: str, found: str, passed: bool) -> Check:
        """A claim that only real training can decide: at the smoke scale it is left open."""
        return Check(claim, paper, found, None if self.scale == "smoke" else bool(passed))


@dataclass(frozen=True)
class Recipe:
    """``run(setting)`` gives the checks; ``source`` is the paper, ``about`` one sentence."""

    name: str
    run: Callable[[Setting], list[Check]]
    source: str
    about: str


RECIPES: dict[str, Recipe] = {}


def recipe(name: str, source: str) -> Callable:
    """Register ``function(setting) -> checks`` under a name; the first line of its docstring says what it is about."""

    def register(function: Callable[[Setting], list[Check]]) -> Callable:
        RECIPES[name] = Recipe(name, function, source, (function.__doc__ or "").strip().splitlines()[0])
        return function

    return register


def reproduce(
    name: str,
    scale: str = "short",
    out: str | Path | None = None,
    *,
    data_dir: Path | None = None,
    seeds: int | None = None,
    device: str = "cpu",
) -> list[Check]:
    """Run a recipe and write ``OUT/checks.json``, ``OUT/checks.md`` and ``OUT/figure.png``, ours beside the paper's.

    A run that was interrupted goes on; without matplotlib there is no figure, but its numbers in ``figure.json``.

    Args:
        name: one of ``RECIPES``.
        scale: ``"smoke"`` (seconds, small data, proves that it runs), ``"short"`` (decides the claims) or ``"paper"``.
        out: default ``runs/reproduce/NAME-SCALE``. seeds: replicates, where the recipe has any.

    Returns: the checks. Raises: ValueError on an unknown name or scale; FileNotFoundError without the data set.
    """
    if name not in RECIPES:
        raise ValueError(f"Expected a recipe of {', '.join(RECIPES)}, got {name!r}")
    if scale not in SCALES:
        raise ValueError(f"Expected a scale of {', '.join(SCALES)}, got {scale!r}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"Expected at least 1 seed, got {seeds}")
    folder = Path("runs/reproduce", f"{name}-{scale}") if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checks = RECIPES[name].run(Setting(scale, folder, data_dir, seeds, device))
    write_json(folder / "checks.json", _record(name, scale, checks))
    image = "figure.png" if (folder / "figure.png").exists() else None
    (folder / "checks.md").write_text(markdown(name, scale, checks, image), encoding="utf-8")
    return checks


def _record(name: str, scale: str, checks: list[Check]) -> dict:
    return {
        "recipe": name,
        "scale": scale,
        "source": RECIPES[name].source,
        "torch": torch.__version__,
        "cpu": device.cpu()["model"],
        "threads": torch.get_num_threads(),
        "checks": [asdict(check) for check in checks],
    }


def table(checks: list[Check]) -> str:
    """The checks as aligned text."""
    rows = [("", "claim", "paper", "found"), *((c.word, c.claim, c.paper, c.found) for c in checks)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(name: str, scale: str, checks: list[Check], image: str | None = None) -> str:
    """The checks as a Markdown page, with the figure where there is one."""
    lines = [f"# {name} ({scale})", "", RECIPES[name].about, "", f"Source: {RECIPES[name].source}.", ""]
    lines += rows(checks)
    decided = [c.passed for c in checks if c.passed is not None]
    lines += ["", f"{sum(decided)} of {len(decided)} decided claims hold.", ""]
    return "\n".join([*lines, *([f"![{name}]({image})", ""] if image else [])])


def rows(checks: list[Check]) -> list[str]:
    """The checks as the lines of a Markdown table."""
    lines = [f"| {c.word} | {c.claim} | {c.paper} | {c.found} |" for c in checks]
    return ["| | claim | paper | found |", "|---|---|---|---|", *lines]


def interval(values: list[float], scale: float = 100, spec: str = "+.2f") -> tuple[float, float, str]:
    """Mean, half width of the 95 % interval (Student's t; infinite with one value) and both in words."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf, format(scale * mean, spec)
    from scipy.stats import t

    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean, half, f"{format(scale * mean, spec)} ± {format(scale * half, spec.lstrip('+'))}"
