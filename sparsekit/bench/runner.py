"""Runs cases into rows: checked, timed beside their rivals, printed, kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import device
from ..clock import Events, Wall, graphed, rotating
from . import gpu, models
from .cases import LEVELS, Case, select
from .facts import environment, pinned
from .layers import LAYERS
from .problem import Problem, Thunk, pose, sparse_thunk, verdict
from .results import Results
from .rivals import RIVALS, absences
from .timing import Spread, limit, probe, spreads

__all__ = ["Ready", "Row", "Session", "prepare", "run", "run_case"]

SECONDS = {"quick": 0.08, "usual": 0.2, "full": 0.4}


@dataclass
class Row:
    """A measured case. Times in us; ``flops`` counts survivors only, ``bytes`` weight and index, ``moved`` all traffic.

    ``rivals`` maps a name to its (p20, p50, p80), ``notes`` one that was not timed to why, and of models says what
    share survives. ``limit`` is what bounds the work, ``flops`` or ``bytes``, at the rates measured in the same run.
    Rows of ``memory`` have no times, and a ``ratio`` of bytes. ``masks`` are ``random``, of ``magnitude``, ``uniform``
    or of a ``ticket``, ``order`` of their rows ``natural`` or ``regrouped``.
    """

    suite: str
    name: str
    subject: str
    op: str
    work: str
    shape: list[int]
    input: list[int]
    density: float
    pattern: str
    format: str
    dtype: str
    device: str
    threads: int
    ratio: float
    bytes: int
    dense_bytes: int
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    dense_us: float | None = None
    rivals: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    flops: int = 0
    gflops: float | None = None
    moved: int = 0
    limit: str | None = None
    limit_us: float | None = None
    percent_of_limit: float | None = None
    error: float = 0.0
    masks: str = "random"
    order: str = "natural"


@dataclass
class Session:
    """What all rows of a run share: where, how carefully, and the ``rates`` that :func:`timing.probe` found.

    ``graphs``: on a GPU, replays of CUDA graphs are timed instead of launches.
    """

    where: str = "cpu"
    level: str = "usual"
    rates: dict[str, Any] | None = None
    graphs: bool = False

    def cold(self, thunks: Sequence[Thunk]) -> Thunk:
        """One thunk of several on buffers of their own, each a CUDA graph where asked."""
        return rotating([graphed(thunk) for thunk in thunks] if self.graphs else thunks)

    def clock(self, positions: int = gpu.FEW) -> Wall | Events:
        """The clock for work on so many positions."""
        return Wall() if self.where == "cpu" else Events(flush=positions < gpu.FEW)

    def has(self, level: str) -> bool:
        """Whether what belongs to ``level`` is part of this run."""
        return LEVELS.index(level) <= LEVELS.index(self.level)


def thunks_of(problem: Problem, session: Session) -> tuple[dict[str, Thunk], dict[str, str]]:
    """The rivals of a problem whose results are right, and why the others are missing."""
    thunks, notes, missing = {}, {}, absences(session.where)
    problems = gpu.clones(problem)
    for rival in RIVALS:
        if not session.has(rival.level):
            continue
        if rival.name in missing:
            notes[rival.name] = missing[rival.name]
            continue
        try:
            made = rival.make(problem)
            if made is None:
                continue
            if not isinstance(made, str):
                if not rival.own_check:
                    verdict(made(), problem, rival.dtype)
                made = session.cold([made, *map(rival.make, problems[1:])])
        except Exception as error:  # a rival that fails is a line of the result, not the end of it
            made = f"failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
        if isinstance(made, str):
            notes[rival.name] = made
        else:
            thunks[rival.name] = made
    return thunks, notes


@dataclass
class Ready:
    """A case that was checked and can be timed: ``thunks`` holds ``sparse`` and its rivals."""

    case: Case
    session: Session
    thunks: dict[str, Thunk]
    clock: Wall | Events
    facts: dict[str, Any]

    def row(self) -> Row:
        """Time all in turn."""
        return _row(self.case, self.session, self.time(), **self.facts)

    def time(self) -> dict[str, Spread]:
        """The times of every thunk."""
        return spreads(self.thunks, SECONDS[self.session.level], self.clock)


def prepare(case: Case, session: Session | None = None) -> Ready:
    """Build a case that takes time and its rivals; raises AssertionError when the sparse result is wrong."""
    session = session or Session()
    if case.suite == "models":
        found = models.prepare(case, session.where)
        facts = {
            "op": "model", "shape": [found.weights], "input": list(found.input), "flops": 0, "moved": 0,
            "bytes": found.bytes, "dense_bytes": found.dense_bytes, "error": found.error, "format": found.formats,
            "notes": found.notes, "masks": case.masks, "order": "regrouped" if case.regrouped else "natural",
        }  # fmt: skip
        thunks = {name: session.cold([thunk]) for name, thunk in found.thunks.items()}
        return Ready(case, session, thunks, session.clock(), facts)
    problem = pose(case, session.where)
    layer, thunk = sparse_thunk(problem)
    error = verdict(thunk(), problem, packed=lambda dw: layer.pack(dw.to(layer.values.device)))
    thunks, notes = thunks_of(problem, session)
    thunks["sparse"] = session.cold([thunk, *(sparse_thunk(p)[1] for p in gpu.clones(problem)[1:])])
    products = 3 if case.work == "step" else 1
    shape = LAYERS[case.subject]
    item = problem.x.element_size()
    index = sum(t.numel() * t.element_size() for t in layer._buffers.values() if t is not None)
    facts = {
        "op": shape.kind, "shape": list(layer.shape), "input": list(shape.input), "format": layer.format.name,
        "flops": 2 * layer.values.numel() * shape.positions * products, "bytes": layer.bytes(),
        "moved": (problem.x.numel() + problem.dy.numel() + layer.values.numel()) * item * products + index,
        "dense_bytes": sum(p.numel() * p.element_size() for p in problem.dense.parameters()), "error": error,
        "notes": notes,
    }  # fmt: skip
    return Ready(case, session, thunks, session.clock(shape.positions), facts)


def run_case(case: Case, session: Session | None = None) -> Row:
    """Measure one case; raises AssertionError when the sparse result is wrong, because then no time counts."""
    return _memory_row(case) if case.work == "memory" else prepare(case, session).row()


def _memory_row(case: Case) -> Row:
    weights, sparse, dense = models.memory(case)
    return Row(
        suite=case.suite, name=case.name, subject=case.subject, op="model", work=case.work, shape=[weights], input=[],
        density=case.density, pattern=case.pattern, format=case.format, dtype=case.dtype, device="",
        threads=torch.get_num_threads(), ratio=dense / sparse, bytes=sparse, dense_bytes=dense,
    )  # fmt: skip


def _row(case: Case, session: Session, times: dict[str, Spread], **facts: Any) -> Row:
    ours = times.pop("sparse")
    dense_us = min(t.p50 for name, t in times.items() if name.startswith("dense"))
    flops, moved = facts["flops"], facts["moved"]
    what, least = limit(session.rates, case.dtype, flops, moved) if session.rates and flops else (None, None)
    return Row(
        suite=case.suite, name=case.name, subject=case.subject, work=case.work, density=case.density,
        pattern=case.pattern, dtype=case.dtype, device=device.describe(session.where), threads=torch.get_num_threads(),
        p20_us=ours.p20, p50_us=ours.p50, p80_us=ours.p80, dense_us=dense_us, ratio=dense_us / ours.p50,
        rivals={name: list(spread) for name, spread in times.items()}, gflops=flops / ours.p50 / 1e3 if flops else None,
        limit=what, limit_us=least, percent_of_limit=100 * least / ours.p50 if least else None, **facts,
    )  # fmt: skip


def run(
    suite: str, *, where: str = "cpu", threads: int | None = None, level: str = "usual", filter: str = "",
    out: str | Path | None = None, again: bool = False, graphs: bool = False, say: Callable[[str], object] = print,
) -> list[Row]:  # fmt: skip
    """Run the cases of a suite and print them; returns the rows of this suite, earlier ones in ``out`` included.

    ``out`` is a JSON file, or a folder to make ``<device>/<date>-<commit>.json`` in. It is written after every row:
    a run that was stopped goes on where it was, and several suites share a file. A case whose result is wrong has
    no row; it is printed, kept under ``failed``, and raises RuntimeError at the end. A case that wants what is not
    here (data, say) is printed with the reason. ``graphs`` times replays of CUDA graphs.

    Raises: ValueError on an unknown suite, no cases, no such device, or a file of another machine or commit.
    """
    cases = select(suite, level, filter, where)
    if where == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected --device cpu, got cuda: torch sees no CUDA device here (see sparsekit info)")
    if graphs and where != "cuda":
        raise ValueError("Expected --graphs with --device cuda, got a CPU, which has none")
    facts = environment(where)  # before pinning, which changes how many processors there seem to be
    with pinned(threads) as threads:
        results, session = Results(out, facts, threads, again), Session(where, level, graphs=graphs)
        begin(cases, session, results, facts, say)
        say(heading())
        rows, failed = [], []
        for case in cases:
            if (kept := results.row(case)) is None:
                try:
                    row = run_case(case, session)
                except models.Unavailable as reason:
                    say(f"{case.name}: left out: {reason}")
                    continue
                except (AssertionError, RuntimeError, ValueError) as error:
                    failed.append(f"{case.suite}/{case.name}")
                    why = " ".join(str(error).split())[:300]
                    results.fail(case, why)
                    say(f"{case.name}: NOT TIMED: {why}")
                    continue
                results.keep(asdict(row))
            else:
                row = Row(**kept)
            rows.append(row)
            say(line(row))
        results.save()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cases)} cases have no row: {', '.join(failed)}")
    return rows


def begin(
    cases: Sequence[Case], session: Session, results: Results, facts: dict[str, Any], say: Callable[[str], object]
) -> None:
    """Say where and with whom, and find the rates that limits are made of, where anything is to be timed."""
    say(f"{facts['device']}, torch {facts['torch']}, {results.threads} threads, commit {facts['commit']}"
        + (" (changed)" if facts["dirty"] else "") + (f" -> {results.path}" if results.path else ""))  # fmt: skip
    for name, reason in absences(session.where).items():
        say(f"without {name}: {reason}")
    wanted = [case for case in cases if results.row(case) is None]
    if len(wanted) < len(cases):
        say(f"{len(cases) - len(wanted)} of {len(cases)} rows are in the file already (--again measures them anew)")
    if any(case.work != "memory" for case in wanted):
        results.rates = results.rates or probe(session.where)
        session.rates = results.rates
        say(_rates(session.rates))


def _rates(rates: dict[str, Any]) -> str:
    flops = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in rates["flops"].items())
    moved = ", ".join(f"{rate / 1e9:.0f} within {int(size) // 1024} KiB" for size, rate in rates["bytes"].items())
    return f"highest rates seen here: GFLOP/s {flops}; GB/s copied {moved}"


def heading() -> str:
    """The head of :func:`line`'s table."""
    return f"{'case':46} {'dense us':>10} {'sparse us':>10} {'ratio':>8} {'of limit':>9} {'bytes':>6}  beside it, us"


def line(row: Row) -> str:
    """A row for a terminal."""
    share = "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f} %"
    beside = ", ".join(f"{name} {times[1]:.0f}" for name, times in row.rivals.items() if name != "dense")
    times = f"{row.dense_us:10.1f} {row.p50_us:10.1f}" if row.p50_us is not None else f"{'-':>10} {'-':>10}"
    return f"{row.name:46} {times} {row.ratio:7.2f}x {share:>9} {row.bytes / row.dense_bytes:5.2f}x  {beside}".rstrip()


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per subject and pattern, forward / step ratios over sparsity; bold where sparse loses."""
    densities = sorted({row.density for row in rows}, reverse=True)
    cells: dict[tuple[str, ...], dict[float, dict[str, float]]] = {}
    for row in rows:
        label = (row.subject, *([row.pattern] if row.pattern != "unstructured" else []))
        label += ("as dense",) if row.format == "dense" else ()
        label += tuple(said for said in (row.dtype, row.masks, row.order) if said not in _USUAL)
        cells.setdefault(label, {}).setdefault(row.density, {})[row.work] = row.ratio
    works = list(dict.fromkeys(row.work for row in rows))
    lines = [f"| x best dense, {' / '.join(works)} | " + " | ".join(f"{1 - d:.0%}" for d in densities) + " |"]
    lines.append("|---|" + "---|" * len(densities))
    for label, by in cells.items():
        shown = (" / ".join(_ratio(by.get(d, {}).get(work)) for work in works) for d in densities)
        lines.append(f"| {' '.join(label)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


_USUAL = ("float32", "random", "magnitude", "natural")


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 else f"**{value:.2f}**"
