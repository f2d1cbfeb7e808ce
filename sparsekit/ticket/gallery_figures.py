"""The figures of several searches and stability measurements, for :mod:`gallery`; needs matplotlib."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import words
from ..figures import STYLE, density_axis, series_style
from ..files import read_tensors, unpack_state
from ..overlap import overlap
from ..words import Summary
from .store import finished_rounds, round_path

__all__ = ["Groups", "bands", "draw", "instabilities", "layers", "overlaps", "paths", "seconds"]

Groups = dict[str, dict[Path, Summary]]


def draw(paint: Callable[[Any], bool]) -> bytes | None:
    """A PNG of what ``paint(figure)`` draws; None where it finds nothing to draw."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure()
        FigureCanvasAgg(figure)
        if not paint(figure):
            return None
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def bands(figure: Any, groups: Groups, key: str) -> bool:
    """One line of means per group and kind of run, with the range over its seeds behind; networks and data sets of
    their own have axes of their own."""
    apart: dict[tuple, Groups] = {}
    for name, group in groups.items():
        config = next(iter(group.values()))["config"]
        apart.setdefault((config.get("model"), config.get("data")), {})[name] = group
    legends = [[_label(kind, name) for name in own for kind in _kinds(own[name])] for own in apart.values()]
    heights = [3.6 + 0.2 * sum(map(_lines, labels)) for labels in legends]
    figure.set_size_inches(8, 0.4 + sum(heights))
    grid = figure.add_gridspec(len(apart), 1, height_ratios=heights)
    drawn = [_bands(figure.add_subplot(grid[n]), own, key) for n, own in enumerate(apart.values())]
    return any(drawn)


def _kinds(group: dict[Path, Summary]) -> list[str]:
    """What was trained in every round: tickets (``""``), then controls."""
    return ["", *dict.fromkeys(c for summary in group.values() for c in words.control_names(summary))]


def _label(kind: str, name: str) -> str:
    return _folded(f"{words.control(kind) if kind else 'ticket'} ({name})")


def _folded(name: str) -> str:
    """A name in lines that a figure is wide enough for."""
    return textwrap.fill(name, 84)


def _lines(text: str) -> int:
    return 1 + text.count("\n")


def _bands(axes: Any, groups: Groups, key: str) -> bool:
    shown, factor = [], 100 if key == "test_accuracy" else 1
    for number, (name, group) in enumerate(groups.items()):
        rounds = [{row["round"]: row for row in summary["rounds"]} for summary in group.values()]
        for which, kind in enumerate(_kinds(group)):
            points = []
            for at in sorted({number for rows in rounds for number in rows}):
                rows = [row[at] for row in rounds if at in row]
                found = [(row.get("controls") or {}).get(kind) or {} if kind else row for row in rows]
                values = [factor * row[key] for row in found if words.finite(row.get(key))]
                if values and rows[0]["density"] > 0:
                    points.append((100 * rows[0]["density"], min(values), sum(values) / len(values), max(values)))
            if len(points) < (1 if kind else 2):  # a dense network alone is no curve
                continue
            x, low, mean, high = zip(*points, strict=True)
            marker, dashes = series_style(which)[1:]
            color = series_style(number if len(groups) > 1 else which)[0]
            axes.plot(x, mean, color=color, marker=marker, linestyle=dashes, label=_label(kind, name))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            shown += x
    if not shown:
        axes.remove()
        return False
    axes.set_ylabel("test accuracy (%)" if key == "test_accuracy" else "early-stop iteration")
    density_axis(axes, shown)
    columns = 2 if max(map(len, axes.get_legend_handles_labels()[1])) < 40 else 1
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=9)
    return True


def seconds(figure: Any, groups: Groups) -> bool:
    """Seconds of training beside what masked-dense steps would have cost."""
    def of(group: dict[Path, Summary], key: str) -> list[Any]:
        return [summary["total"].get(key) for summary in group.values()]

    totals = [(name, of(g, "train_seconds"), of(g, "masked_dense_seconds")) for name, g in groups.items()]
    totals = [(name, sum(ours), sum(dense)) for name, ours, dense in totals if all(map(words.finite, (*ours, *dense)))]
    if not totals:
        return False
    totals = [(_folded(name), ours, dense) for name, ours, dense in totals]
    one = 0.65 + 0.2 * max(_lines(name) for name, _, _ in totals)  # inches: a name and two bars
    figure.set_size_inches(8, max(2.8, 1.6 + one * len(totals)))
    axes, at, bar = figure.add_subplot(), range(len(totals)), 0.28 / one
    axes.barh([i + bar / 2 for i in at], [dense for _, _, dense in totals], bar, color="#C9CDD2", label="masked dense")
    axes.barh([i + 1.5 * bar for i in at], [ours for _, ours, _ in totals], bar, color="#0072B2", label="sparsekit")
    for i, (name, _, _) in enumerate(totals):
        axes.text(0, i - 0.02, name, va="bottom", fontsize=10)
    axes.set_yticks([])
    axes.set_ylim(len(totals) - 1 + 2.4 * bar, -1 + 2 * bar)
    axes.set_xlabel("seconds of training, all replicates")
    axes.legend(loc="best")
    return True


def layers(figure: Any, groups: Groups) -> bool:
    """Weights remaining layer by layer in the last round."""
    lasts = {name: next(iter(group.values()))["rounds"][-1:] for name, group in groups.items()}
    densities = {
        name: {str(layer.get("name")): layer.get("density") for row in last for layer in row.get("layers") or ()}
        for name, last in lasts.items()
    }
    every = list(dict.fromkeys(layer for found in densities.values() for layer in found))
    if not every:
        return False
    axes = figure.add_subplot()
    for number, (name, found) in enumerate(densities.items()):
        color, marker, dashes = series_style(number)
        points = [(every.index(layer), 100 * value) for layer, value in found.items() if words.finite(value)]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=dashes, label=_folded(name))
    axes.set_xticks(range(len(every)), every, rotation=60, fontsize=8)
    axes.set_ylabel("weights remaining (%)")
    _legend_below(figure, list(densities))
    return True


def _legend_below(figure: Any, names: list[str]) -> None:
    """A legend that the figure grows by, in two columns where the names are short."""
    columns = 2 if max(map(len, names)) < 40 else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * -(-sum(_lines(_folded(name)) for name in names) // columns))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9)


def overlaps(figure: Any, groups: Groups) -> bool:
    """The matrix of Jaccard overlaps between the last masks of up to 20 runs."""
    masks: dict[str, Any] = {}
    for run in (run for group in groups.values() for run in group):
        if len(finished := finished_rounds(run)) > 1 and len(masks) < 20:
            found = unpack_state(*read_tensors(round_path(run, finished[-1]) / "trained.safetensors"))[1]
            if not masks or _shapes(found) == _shapes(next(iter(masks.values()))):
                masks[f"{run.parent.name}/{run.name}"] = found
    if len(masks) < 2:
        return False
    side = max(4.6, 0.5 * len(masks))
    figure.set_size_inches(side + 3, side + 1.5)
    matrix, axes = overlap(masks).numpy(), figure.add_subplot()
    axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=_ink(value))
    axes.set_xticks(range(len(masks)), list(masks), rotation=60, fontsize=9)
    axes.set_yticks(range(len(masks)), list(masks), fontsize=9)
    axes.grid(visible=False)
    return True


def _ink(value: float) -> str:
    return "white" if value > 0.6 else "#333333"


def _shapes(masks: dict) -> dict:
    return {name: mask.shape for name, mask in masks.items()}


def instabilities(figure: Any, measured: dict[str, dict]) -> bool:
    """Instability against the step that children branch from, its range over pairs, and the line of stability."""
    axes, threshold = figure.add_subplot(), 2.0
    for number, (name, found) in enumerate(measured.items()):
        color, marker, dashes = series_style(number)
        steps = [row["step"] for row in found["steps"]]
        pairs = [[100 * value for value in row["values"]] for row in found["steps"]]
        axes.plot(steps, [100 * r["value"] for r in found["steps"]], color=color, marker=marker, ls=dashes, label=name)
        axes.fill_between(steps, list(map(min, pairs)), list(map(max, pairs)), color=color, alpha=0.15, linewidth=0)
    axes.axhline(threshold, color="#8C8C8C", linewidth=1, linestyle="--")
    axes.set_xlabel("step k that children branch from; dashed: 2 %, stable below")
    axes.set_ylabel("instability (%)")
    _legend_below(figure, list(measured))
    return True


def paths(figure: Any, measured: dict[str, dict]) -> bool:
    """The error along the line between children: one small plot for each measurement, one curve for each step."""
    figure.set_size_inches(8, 3.2 * len(measured))
    for axes, (name, found) in zip(figure.subplots(len(measured), squeeze=False)[:, 0], measured.items(), strict=True):
        for number, row in enumerate(found["steps"]):
            color, _, dashes = series_style(number)
            for pair, curve in enumerate(row["curves"]):
                label = f"k = {row['step']}" if pair == 0 else None
                axes.plot(row["alphas"], [100 * error for error in curve], color=color, linestyle=dashes, label=label)
        axes.set_title(name, fontsize=11)
        axes.set_ylabel("error (%)")
        axes.legend(loc="best", fontsize=9)
    axes.set_xlabel("α, from one child to the other")
    return True
