"""Several searches on one page: bands over seeds, verdicts, overlap of masks, seconds; as HTML and as Markdown."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .. import words
from ..files import read_json
from ..report import ledger_rows, read_summary
from ..words import Summary
from .gallery_figures import Groups, bands, draw, instabilities, layers, overlaps, paths, seconds
from .verdict import study, verdict_rows

__all__ = ["find_runs", "write_gallery"]

_STABILITY = "stability*.json"
_REPLICATE = ("seed", "note", "cpu", "torch", "threads")  # what may differ between replicates of one search


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The run directories among ``folders`` and below them, in order of their names.

    Raises: FileNotFoundError for a folder that has none, and no measurements of stability nor recipe's verdict.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        runs = sorted(path.parent for path in folder.rglob("summary.json"))
        if not runs and not list(folder.rglob(_STABILITY)) and not list(folder.rglob("checks.json")):
            raise FileNotFoundError(f"{folder}: Expected a run directory, or folders of them, got no summary.json")
        found += [run for run in runs if run not in found]
    return found


def write_gallery(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write ``OUT/index.html``, which needs nothing else, and ``OUT/report.md`` with its figures; returns the first.

    Runs that differ in their seed alone are replicates: drawn as one line with a band from the lowest to the
    highest, and judged together. Measurements of ``sparsekit stability --json stability….json`` and verdicts of
    ``sparsekit reproduce``, with their figures, that lie in the folders are shown too.

    Raises: FileNotFoundError or ValueError naming the file, before anything is written; ImportError without matplotlib.
    """
    groups = _groups({run: read_summary(run) for run in find_runs(folders)})
    verdicts = {path: read_json(path) for path in _below(folders, "checks.json")}
    measured = dict(map(_stability, _below(folders, _STABILITY)))
    drawings = (
        ("accuracy", "Test accuracy against weights remaining", partial(bands, key="test_accuracy"), groups),
        ("early-stop", "Early stop against weights remaining", partial(bands, key="early_stop_iteration"), groups),
        ("instability", "Instability against the step of branching", instabilities, measured),
        ("paths", "Error on the line between children", paths, measured),
        ("layers", "Layers in the last round", layers, groups),
        ("overlap", "Overlap of the last masks (Jaccard)", overlaps, groups),
        ("seconds", "Training against masked dense, seconds", seconds, groups),
    )  # fmt: skip
    figures = {}
    for number, (path, found) in enumerate(verdicts.items()):
        if (image := path.parent / "figure.png").exists():
            figures[f"recipe-{number}"] = f"{found.get('recipe')} ({found.get('scale')})", image.read_bytes()
    for name, title, paint, source in drawings:
        if source and (image := draw(lambda figure, paint=paint, source=source: paint(figure, source))) is not None:
            figures[name] = title, image
    tables = [*map(_checks, verdicts.values()), *map(_stable, measured.items())]
    tables += [table for name, group in groups.items() for table in _tables(name, group)]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, (_, image) in figures.items():
        (out / f"{name}.png").write_bytes(image)
    (out / "report.md").write_text(_markdown(figures, tables), encoding="utf-8")
    (out / "index.html").write_text(_html(figures, tables), encoding="utf-8")
    return out / "index.html"


def _below(folders: Sequence[str | Path], pattern: str) -> list[Path]:
    return list(dict.fromkeys(path for folder in folders for path in sorted(Path(folder).rglob(pattern))))


def _stability(path: Path) -> tuple[str, dict]:
    """What ``sparsekit stability`` measured, and what to call it; raises ValueError on anything else."""
    found = read_json(path)
    try:
        for row in found["steps"]:
            points = [len(curve) for curve in row["curves"]]
            if not points or set(points) != {len(row["alphas"])} or len(points) != len(row["values"]):
                raise ValueError
            float(row["step"] + row["value"] + sum(row["values"]) + sum(row["alphas"]) + sum(map(sum, row["curves"])))
        ticket = f", ticket {found['ticket']}" if found.get("ticket") else ""
        return f"{found['model']}, {found['data']}, seed {found['seed']}{ticket}", found
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: Expected what sparsekit stability --json writes, got something else") from None


def _groups(summaries: dict[Path, Summary]) -> Groups:
    groups: dict[str, dict[Path, Summary]] = {}
    for run, summary in summaries.items():
        config = {key: value for key, value in summary["config"].items() if key not in _REPLICATE}
        groups.setdefault(json.dumps(config, sort_keys=True), {})[run] = summary
    named: Groups = {}
    for group in groups.values():
        config = next(iter(group.values()))["config"]
        configs = [next(iter(other.values()))["config"] for other in groups.values()]
        configs = [other for other in configs if words.name(other) == words.name(config)]
        different = [
            f"{key} {words.cell(words.rate(config[key]).replace('`', '') if key == 'rate' else config.get(key))}"
            for key in ("criterion", "scope", "rewind", "pattern", "rate", "rounds", "iterations", "optimizer", "start")
            if config.get(key) is not None and any(other.get(key) != config.get(key) for other in configs)
        ]
        name = ", ".join([words.name(config), *different])
        named[name if name not in named else f"{name} ({next(iter(group))})"] = group
    return named


Table = tuple[str, list[str], list[list[str]]]


def _checks(found: dict) -> Table:
    verdict = {True: "PASS", False: "FAIL", None: "too small"}
    rows = [
        [verdict.get(each.get("passed"), "?"), *(str(each.get(key, "")) for key in ("claim", "paper", "found"))]
        for each in found.get("checks", [])
    ]
    return f"{found.get('recipe')} ({found.get('scale')})", ["", "claim", "paper", "found"], rows


def _stable(named: tuple[str, dict]) -> Table:
    rows = [
        [str(row["step"]), f"{100 * row['value']:.2f}", "yes" if row["stable"] else "no", str(len(row["curves"]))]
        for row in named[1]["steps"]
    ]
    return f"Stability: {named[0]}", ["step", "instability %", "stable", "pairs"], rows


def _tables(name: str, group: dict[Path, Summary]) -> list[Table]:
    tables: list[Table] = []
    try:
        head, *rows = verdict_rows(study(list(group.values())))
        tables.append((f"Verdict: {name}, {len(group)} {'seed' if len(group) == 1 else 'seeds'}", head, rows))
    except (ValueError, KeyError):
        pass  # a search that recorded no accuracy, or is unfinished, has no verdict; its ledger follows
    for run, summary in group.items():
        head, rows = ledger_rows(summary)
        tables.append((f"Ledger: {run}", head, rows))
    return tables


def _markdown(figures: dict, tables: list[Table]) -> str:
    lines = ["# Ticket searches", ""]
    for name, (title, _) in figures.items():
        lines += [f"## {title}", "", f"![{title}]({name}.png)", ""]
    for title, head, rows in tables:
        lines += [f"## {words.cell(title)}", "", _row(head), "|" + "---|" * len(head), *map(_row, rows), ""]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(map(words.cell, cells)) + " |"


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Ticket searches</title><style>
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:0 0 2rem;font-size:14px}
th,td{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}
img{max-width:100%}div{overflow-x:auto}</style><h1>Ticket searches</h1>
"""


def _html(figures: dict, tables: list[Table]) -> str:
    parts = [_PAGE]
    for title, image in figures.values():
        content = base64.b64encode(image).decode()
        title = html.escape(title)
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{content}">')
    for title, head, rows in tables:
        cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{html.escape(title)}</h2><div><table><tr>{cells}</tr>{body}</table></div>")
    return "\n".join(parts) + "</html>\n"
