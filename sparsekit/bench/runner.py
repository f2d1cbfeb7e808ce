"""Runs cases into rows: checked, timed beside their rivals, printed, kept in a file that a later run goes on with."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import device
from . import models
from .cases import LAYERS, LEVELS, MODELS, Case, select
from .facts import environment, pinned
from .problem import Problem, Thunk, pose, sparse_thunk, verdict
from .rivals import RIVALS, absences
from .timing import Spread, limit, probe, spreads

__all__ = ["Row", "Session", "read", "run", "run_case"]

SECONDS = {"quick": 0.08, "usual": 0.2, "full": 0.4}


@dataclass
class Row:
    """A measured case. Times in us; ``flops`` counts survivors only, ``bytes`` weight and index, ``moved`` all traffic.

    ``rivals`` maps a name to its (p20, p50, p80), ``notes`` one that was not timed to why. ``limit`` is what
    bounds the work, ``flops`` or ``bytes``, at the rates measured in the same run. Rows of ``memory`` have no times,
    and a ``ratio`` of bytes.
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


@dataclass
class Session:
    """What all rows of a run share: where, how carefully, and the ``rates`` that :func:`timing.probe` found."""

    where: str = "cpu"
    level: str = "usual"
    rates: dict[str, Any] | None = None

    def has(self, level: str) -> bool:
        """Whether what belongs to ``level`` is part of this run."""
        return LEVELS.index(level) <= LEVELS.index(self.level)


def thunks_of(problem: Problem, session: Session) -> tuple[dict[str, Thunk], dict[str, str]]:
    """The rivals of a problem whose results are right, and why the others are missing."""
    thunks, notes, missing = {}, {}, absences()
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
                verdict(made(), problem, rival.dtype)
        except Exception as error:  # a rival that fails is a line of the result, not the end of it
            made = f"failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
        if isinstance(made, str):
            notes[rival.name] = made
        else:
            thunks[rival.name] = made
    return thunks, notes


def run_case(case: Case, session: Session | None = None) -> Row:
    """Measure one case; raises AssertionError when the sparse result is wrong, because then no time counts."""
    session = session or Session()
    if case.work == "memory":
        return _memory_row(case)
    if case.subject in MODELS and case.suite == "models":
        return _model_row(case, session)
    problem = pose(case, session.where)
    layer, thunk = sparse_thunk(problem)
    error = verdict(thunk(), problem, packed=lambda dw: layer.pack(dw.to(layer.values.device)))
    thunks, notes = thunks_of(problem, session)
    times = spreads({**thunks, "sparse": thunk}, SECONDS[session.level])
    products = 3 if case.work == "step" else 1
    shape = LAYERS[case.subject]
    flops = 2 * layer.values.numel() * shape.positions * products
    item = problem.x.element_size()
    index = sum(t.numel() * t.element_size() for t in layer._buffers.values() if t is not None)
    moved = (problem.x.numel() + problem.dy.numel() + layer.values.numel()) * item * products + index
    plain = sum(p.numel() * p.element_size() for p in problem.dense.parameters())
    return _row(
        case, session, times, notes, op=shape.kind, shape=list(layer.shape), input=list(shape.input), flops=flops,
        bytes=layer.bytes(), dense_bytes=plain, moved=moved, error=error, format=layer.format.name,
    )  # fmt: skip


def _model_row(case: Case, session: Session) -> Row:
    found = models.prepare(case, session.where)
    times = spreads(found.thunks, SECONDS[session.level])
    return _row(
        case, session, times, found.notes, op="model", shape=[found.weights], input=list(found.input), flops=0,
        bytes=found.bytes, dense_bytes=found.dense_bytes, moved=0, error=found.error, format=found.formats,
    )  # fmt: skip


def _memory_row(case: Case) -> Row:
    weights, sparse, dense = models.memory(case)
    return Row(
        suite=case.suite, name=case.name, subject=case.subject, op="model", work=case.work, shape=[weights], input=[],
        density=case.density, pattern=case.pattern, format=case.format, dtype=case.dtype, device="",
        threads=torch.get_num_threads(), ratio=dense / sparse, bytes=sparse, dense_bytes=dense,
    )  # fmt: skip


def _row(case: Case, session: Session, times: dict[str, Spread], notes: dict[str, str], **facts: Any) -> Row:
    ours = times.pop("sparse")
    dense_us = min(t.p50 for name, t in times.items() if name.startswith("dense"))
    flops, moved = facts["flops"], facts["moved"]
    what, least = limit(session.rates, case.dtype, flops, moved) if session.rates and flops else (None, None)
    return Row(
        suite=case.suite, name=case.name, subject=case.subject, work=case.work, density=case.density,
        pattern=case.pattern, dtype=case.dtype, device=device.describe(session.where), threads=torch.get_num_threads(),
        p20_us=ours.p20, p50_us=ours.p50, p80_us=ours.p80, dense_us=dense_us, ratio=dense_us / ours.p50,
        rivals={name: list(spread) for name, spread in times.items()}, gflops=flops / ours.p50 / 1e3 if flops else None,
        limit=what, limit_us=least, percent_of_limit=100 * least / ours.p50 if least else None, notes=notes, **facts,
    )  # fmt: skip


def read(path: str | Path) -> dict[str, Any]:
    """A result file, checked; raises FileNotFoundError, or ValueError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Expected a result file of sparsekit bench, got no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["environment"], dict) or not isinstance(found["rows"], list):
            raise TypeError("another shape")
        for row in found["rows"]:
            _ = row["name"] + row["work"], float(row["ratio"]), row["rivals"].items(), int(row["threads"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: Expected a result file of sparsekit bench, got another ({error!r})") from None
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Replace a result file in one step, so that a kill leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def place(out: Path, facts: dict[str, Any]) -> Path:
    """The file that ``--json OUT`` means: in a folder, ``<device>/<date>-<commit>.json``."""
    if out.suffix == ".json" and not out.is_dir():
        return out
    dirty = "-dirty" if facts["dirty"] else ""
    return out / facts["device"] / f"{facts['date']}-{facts['commit'] or 'unknown'}{dirty}.json"


def _resume(path: Path | None, facts: dict[str, Any], again: bool) -> dict[str, Any]:
    """What an earlier run left in the file, if it ran on the same machine, versions and commit."""
    fresh = {"environment": facts, "limits": {}, "rows": [], "failed": {}}
    if path is None or not path.exists() or again:
        return fresh
    found = fresh | read(path)
    theirs = found["environment"]
    changed = [key for key in facts if key != "date" and theirs.get(key) != facts[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{path}: Expected rows with {key} {facts[key]}, got {theirs.get(key)}: another file, or --again"
        )
    return found


def run(
    suite: str, *, where: str = "cpu", threads: int | None = None, level: str = "usual", filter: str = "",
    out: str | Path | None = None, again: bool = False, say: Callable[[str], object] = print,
) -> list[Row]:  # fmt: skip
    """Run the cases of a suite and print them; returns the rows of this suite, earlier ones in ``out`` included.

    ``out`` is a JSON file, or a folder to make ``<device>/<date>-<commit>.json`` in. It is written after every row:
    a run that was stopped goes on where it was, and several suites share a file. A case whose result is wrong has
    no row; it is printed, kept under ``failed``, and raises RuntimeError at the end.

    Raises: ValueError on an unknown suite, no cases, no such device, or a file of another machine or commit.
    """
    cases = select(suite, level, filter)
    if where == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected --device cpu, got cuda: torch sees no CUDA device here (see sparsekit info)")
    facts = environment(where)  # before pinning, which changes how many processors there seem to be
    path = None if out is None else place(Path(out), facts)
    found = _resume(path, facts, again)
    with pinned(threads) as threads:
        rows, failed = _measure(cases, Session(where, level), facts, found, path, threads, say)
    if path is not None:
        write(path, found)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cases)} cases have no row: {', '.join(failed)}")
    return rows


def _measure(
    cases: Sequence[Case], session: Session, facts: dict[str, Any], found: dict[str, Any], path: Path | None,
    threads: int, say: Callable[[str], object],
) -> tuple[list[Row], dict[str, str]]:  # fmt: skip
    """Fill ``found`` with the rows it lacks; returns the rows of ``cases``, and why some have none."""
    say(f"{facts['device']}, torch {facts['torch']}, {threads} threads, commit {facts['commit']}"
        + (" (changed)" if facts["dirty"] else "") + (f" -> {path}" if path else ""))  # fmt: skip
    for name, reason in absences().items():
        say(f"without {name}: {reason}")
    done = {(row["suite"], row["name"], row["threads"]): row for row in found["rows"] if "suite" in row}
    kept = [key for case in cases if (key := (case.suite, case.name, threads)) in done]
    if kept:
        say(f"{len(kept)} of {len(cases)} rows are in the file already (--again measures them anew)")
    if len(kept) < len(cases) and any(case.work != "memory" for case in cases):
        session.rates = found["limits"].get(str(threads)) or probe(session.where)
        found["limits"][str(threads)] = session.rates
        say(_rates(session.rates))
    say(heading())
    rows, failed = [], {}
    for case in cases:
        key = (case.suite, case.name, threads)
        if key not in done:
            try:
                row = run_case(case, session)
            except (AssertionError, RuntimeError, ValueError) as error:
                failed[f"{case.suite}/{case.name}"] = " ".join(str(error).split())[:300]
                say(f"{case.name}: NOT TIMED: {failed[f'{case.suite}/{case.name}']}")
                continue
            row.device = facts["device"]
            done[key] = asdict(row)
            found["rows"].append(done[key])
            if path is not None:
                write(path, found)
        rows.append(Row(**done[key]))
        say(line(rows[-1]))
    found["failed"] = {k: why for k, why in found["failed"].items() if not _now_done(k, done, threads)} | failed
    return rows, failed


def _now_done(failed: str, done: dict, threads: int) -> bool:
    suite, _, name = failed.partition("/")
    return (suite, name, threads) in done


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
        cells.setdefault(label, {}).setdefault(row.density, {})[row.work] = row.ratio
    works = list(dict.fromkeys(row.work for row in rows))
    lines = [f"| x best dense, {' / '.join(works)} | " + " | ".join(f"{1 - d:.0%}" for d in densities) + " |"]
    lines.append("|---|" + "---|" * len(densities))
    for label, by in cells.items():
        shown = (" / ".join(_ratio(by.get(d, {}).get(work)) for work in works) for d in densities)
        lines.append(f"| {' '.join(label)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 else f"**{value:.2f}**"
