"""Two result files side by side: which ratios fell by more than the noise of both."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .results import read

__all__ = ["Change", "against", "compare", "render"]

LEAST = 0.05
"""Changes of ratio below this are never called any: two runs of one commit differ by as much."""


class Change(NamedTuple):
    """One case in both files; ``band`` is the relative change of ratio that noise explains."""

    name: str
    threads: int
    before: float
    after: float
    band: float

    @property
    def verdict(self) -> str:
        """Worse when the ratio fell by more than the band, better when it rose by more."""
        if self.after < self.before * (1 - self.band):
            return "worse"
        return "better" if self.after > self.before / (1 - self.band) else "same"


def _noise(row: dict[str, Any]) -> float:
    """The relative spread of a row's ratio, from the middle three fifths of its samples."""
    times = [(row.get("p20_us"), row.get("p50_us"), row.get("p80_us"))]
    dense = [spread for name, spread in row["rivals"].items() if name.startswith("dense")]
    if dense:
        times.append(tuple(min(dense, key=lambda spread: spread[1])))
    spreads = [(p80 - p20) / (2 * p50) for p20, p50, p80 in times if p50]
    return math.hypot(*spreads) if spreads else 0.0


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Change], list[str]]:
    """The cases in both results, worst first, and the names of those in only one of them.

    Ratios are compared, not times, so that results of two machines or of a busy one still mean something.
    """
    old, new = ({(r.get("suite"), r["name"], r["threads"]): r for r in found["rows"]} for found in (before, after))
    changes = [
        Change(f"{suite}/{name}", threads, old[key]["ratio"], new[key]["ratio"], _band(old[key], new[key]))
        for key in old.keys() & new.keys()
        for suite, name, threads in [key]
    ]
    changes.sort(key=lambda change: (change.after / change.before, change.name))
    return changes, sorted(f"{suite}/{name}" for suite, name, _ in old.keys() ^ new.keys())


def _band(*rows: dict[str, Any]) -> float:
    return min(0.5, max(LEAST, math.hypot(*map(_noise, rows))))


def render(changes: Iterable[Change], alone: Iterable[str]) -> str:
    """A table for a terminal: what changed beyond noise, then a summary."""
    changes, alone = list(changes), list(alone)
    lines = [f"{'case':56} {'threads':>7} {'before':>8} {'after':>8} {'noise':>6}"]
    for c in changes:
        if c.verdict != "same":
            ratios = f"{c.before:7.2f}x {c.after:7.2f}x"
            lines.append(f"{c.name:56} {c.threads:7} {ratios} {c.band:5.0%}  {c.verdict.upper()}")
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("worse", "same", "better")}
    lines.append(
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f", {len(alone)} in one file only"
    )
    return "\n".join(lines)


def against(ref: str, words: list[str], after: Path) -> tuple[list[Change], list[str]]:
    """Run ``sparsekit bench WORDS`` on the tree of a git reference as well, and compare it with the rows in ``after``.

    The reference is checked out into a worktree of its own and built there, the repository is left alone.
    Raises: ValueError where there is no repository or no such reference, RuntimeError where it does not run there.
    """
    here = Path(__file__).resolve().parents[2]
    if _run(["git", "-C", str(here), "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"]).returncode:
        raise ValueError(f"Expected --base with a commit of the repository at {here}, got {ref!r}")
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "base.json"
        _must(["git", "-C", str(here), "worktree", "add", "--detach", str(tree), ref])
        try:
            _must([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
            if not (tree / "sparsekit/kernels").exists():
                (tree / "sparsekit/kernels").symlink_to("../kernels")
            _must([sys.executable, "-m", "sparsekit", "bench", *words, "--json", str(out)], tree)
            return compare(read(out), read(after))
        finally:
            _run(["git", "-C", str(here), "worktree", "remove", "--force", str(tree)])


def _run(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess:
    environment = None if folder is None else {**os.environ, "PYTHONPATH": str(folder)}
    if environment and not torch.cuda.is_available():
        environment.setdefault("SPARSEKIT_CUDA", "0")  # minutes of nvcc for kernels that cannot run
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _must(command: list[str], folder: Path | None = None) -> None:
    done = _run(command, folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-600:]}")
