"""Several searches on one page: bands over seeds, verdicts, overlap of masks, seconds; as HTML and as Markdown."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import words
from ..figures import STYLE, density_axis, series_style
from ..files import read_json, read_tensors, unpack_state
from ..overlap import overlap
from ..report import ledger_rows, read_summary
from ..words import Summary
from .store import finished_rounds, round_path
from .verdict import study, verdict_rows

__all__ = ["find_runs", "write_gallery"]

_REPLICATE = ("seed", "note", "cpu", "torch", "threads")  # what may differ between replicates of one search


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The run directories among ``folders`` and below them, in order of their names.

    Raises: FileNotFoundError for a folder without any.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        runs = sorted(path.parent for path in folder.rglob("summary.json"))
        if not runs:
            raise FileNotFoundError(f"{folder}: Expected a run directory, or folders of them, got no summary.json")
        found += [run for run in runs if run not in found]
    return found


def write_gallery(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write ``OUT/index.html``, which needs nothing else, and ``OUT/report.md`` with its figures; returns the first.

    Runs that differ in their seed alone are replicates: drawn as one line with a band from the lowest to the
    highest, and judged together. Verdicts of ``sparsekit reproduce`` that lie in the folders are shown too.

    Raises: FileNotFoundError or ValueError naming the file, before anything is written; ImportError without matplotlib.
    """
    runs = find_runs(folders)
    groups = _groups({run: read_summary(run) for run in runs})
    checks = [read_json(path) for folder in folders for path in sorted(Path(folder).rglob("checks.json"))]
    drawings = {
        "accuracy": ("Test accuracy against weights remaining", partial(_bands, key="test_accuracy", factor=100)),
        "early-stop": ("Early stop against weights remaining", partial(_bands, key="early_stop_iteration", factor=1)),
        "seconds": ("Training against masked dense, seconds", _seconds),
        "layers": ("Layers in the last round", _layers),
        "overlap": ("Overlap of the last masks (Jaccard)", _overlap),
    }
    drawn = {name: (title, _draw(paint, groups)) for name, (title, paint) in drawings.items()}
    figures = {name: figure for name, figure in drawn.items() if figure[1]}
    tables = [*map(_checks, checks), *(table for name, group in groups.items() for table in _tables(name, group))]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, (_, image) in figures.items():
        (out / f"{name}.png").write_bytes(image)
    (out / "report.md").write_text(_markdown(figures, tables), encoding="utf-8")
    (out / "index.html").write_text(_html(figures, tables), encoding="utf-8")
    return out / "index.html"


Groups = dict[str, dict[Path, Summary]]


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
            f"{key} {words.cell(words.rate(config[key]) if key == 'rate' else config.get(key))}"
            for key in ("criterion", "scope", "rewind", "pattern", "rate", "rounds", "iterations", "optimizer")
            if any(other.get(key) != config.get(key) for other in configs)
        ]
        name = ", ".join([words.name(config), *different])
        named[name if name not in named else f"{name} ({next(iter(group))})"] = group
    return named


def _draw(paint: Callable[..., bool], groups: Groups) -> bytes | None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure()
        FigureCanvasAgg(figure)
        if not paint(figure, groups):
            return None
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def _bands(figure: Any, groups: Groups, key: str, factor: float) -> bool:
    """One line of means per group and kind of run, with the range over its seeds behind."""
    axes, shown = figure.add_subplot(), []
    for number, (name, group) in enumerate(groups.items()):
        rounds = [{row["round"]: row for row in summary["rounds"]} for summary in group.values()]
        kinds = ["", *dict.fromkeys(c for summary in group.values() for c in words.control_names(summary))]
        for which, kind in enumerate(kinds):
            points = []
            for at in sorted({number for rows in rounds for number in rows}):
                rows = [row[at] for row in rounds if at in row]
                found = [(row.get("controls") or {}).get(kind) or {} if kind else row for row in rows]
                values = [factor * row[key] for row in found if words.finite(row.get(key))]
                if values and rows[0]["density"] > 0:
                    points.append((100 * rows[0]["density"], min(values), sum(values) / len(values), max(values)))
            if len(points) < 2:
                continue
            x, low, mean, high = zip(*points, strict=True)
            marker, dashes = series_style(which)[1:]
            color = series_style(number if len(groups) > 1 else which)[0]
            label = f"{words.control(kind) if kind else 'ticket'}{f' ({name})' if len(groups) > 1 else ''}"
            axes.plot(x, mean, color=color, marker=marker, linestyle=dashes, label=label)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            shown += x
    if not shown:
        return False
    axes.set_ylabel("test accuracy (%)" if key == "test_accuracy" else "early-stop iteration")
    density_axis(axes, shown)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return True


def _seconds(figure: Any, groups: Groups) -> bool:
    def of(group: dict[Path, Summary], key: str) -> list[Any]:
        return [summary["total"].get(key) for summary in group.values()]

    totals = [(name, of(g, "train_seconds"), of(g, "masked_dense_seconds")) for name, g in groups.items()]
    totals = [(name, sum(ours), sum(dense)) for name, ours, dense in totals if all(map(words.finite, (*ours, *dense)))]
    if not totals:
        return False
    figure.set_size_inches(8, max(2.8, 1.6 + 0.8 * len(totals)))
    axes, at = figure.add_subplot(), range(len(totals))
    axes.barh([i - 0.2 for i in at], [dense for _, _, dense in totals], 0.38, color="#C9CDD2", label="masked dense")
    axes.barh([i + 0.2 for i in at], [ours for _, ours, _ in totals], 0.38, color="#0072B2", label="sparsekit")
    for i, (name, _, _) in enumerate(totals):
        axes.text(0, i - 0.42, f" {name}", va="bottom", fontsize=10)
    axes.set_yticks([])
    axes.set_ylim(len(totals) - 0.4, -1.0)
    axes.set_xlabel("seconds of training, all replicates")
    axes.legend(loc="best")
    return True


def _layers(figure: Any, groups: Groups) -> bool:
    lasts = {name: next(iter(group.values()))["rounds"][-1:] for name, group in groups.items()}
    layers = {
        name: {str(layer.get("name")): layer.get("density") for row in last for layer in row.get("layers") or ()}
        for name, last in lasts.items()
    }
    every = list(dict.fromkeys(layer for found in layers.values() for layer in found))
    if not every:
        return False
    axes = figure.add_subplot()
    for number, (name, found) in enumerate(layers.items()):
        color, marker, dashes = series_style(number)
        points = [(every.index(layer), 100 * value) for layer, value in found.items() if words.finite(value)]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=dashes, label=name)
    axes.set_xticks(range(len(every)), every, rotation=60, fontsize=8)
    axes.set_ylabel("weights remaining (%)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return True


def _overlap(figure: Any, groups: Groups) -> bool:
    masks: dict[str, Any] = {}
    for run in (run for group in groups.values() for run in group):
        if len(finished := finished_rounds(run)) > 1 and len(masks) < 20:
            found = unpack_state(*read_tensors(round_path(run, finished[-1]) / "trained.safetensors"))[1]
            if not masks or _shapes(found) == _shapes(next(iter(masks.values()))):
                masks[f"{run.parent.name}/{run.name}"] = found
    if len(masks) < 2:
        return False
    matrix, axes = overlap(masks).numpy(), figure.add_subplot()
    axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "#333333")
    axes.set_xticks(range(len(masks)), list(masks), rotation=60, fontsize=9)
    axes.set_yticks(range(len(masks)), list(masks), fontsize=9)
    axes.grid(visible=False)
    return True


def _shapes(masks: dict) -> dict:
    return {name: mask.shape for name, mask in masks.items()}


Table = tuple[str, list[str], list[list[str]]]


def _checks(found: dict) -> Table:
    verdict = {True: "PASS", False: "FAIL", None: "too small"}
    rows = [
        [verdict.get(each.get("passed"), "?"), *(str(each.get(key, "")) for key in ("claim", "paper", "found"))]
        for each in found.get("checks", [])
    ]
    return f"{found.get('recipe')} ({found.get('scale')})", ["", "claim", "paper", "found"], rows


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
