"""The figures of a report, in the manner of the papers; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import words
from .words import Summary

__all__ = ["STYLE", "density_axis", "series_style", "write_figures"]

# Figures: 8 inches wide, so that 11 points stay readable at 800 pixels. Colours of Okabe and Ito, which
# colour-blind readers can tell apart; every series also has its own marker and line.

_BLUE, _ORANGE, _GREEN, _GREY, _INK = "#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#333333"
_PURPLE = "#CC79A7"
_CONTROL_STYLES = (
    (_ORANGE, "s", (0, (5, 2))),
    (_GREEN, "^", (0, (1, 1.5))),
    (_PURPLE, "D", (0, (3, 1, 1, 1))),
    ("#E69F00", "v", (0, (8, 2))),
    ("#56B4E9", "P", (0, (2, 1))),
    (_INK, "X", (0, (6, 1, 1, 1, 1, 1))),
    ("#7B4B2A", "<", (0, (4, 4))),
    (_GREY, ">", (0, (1, 3))),
)
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "savefig.dpi": 150,
    "figure.figsize": (8, 4.6),
    "figure.constrained_layout.use": True,
}


def write_figures(summary: Summary, folder: Path) -> list[tuple[str, str]]:
    """Draw what there are numbers for; returns (title, path relative to the report)."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def accuracy(figure: Figure) -> bool:
        return _curves(figure, summary, "test_accuracy", 100, "test accuracy (%)")

    def early_stop(figure: Figure) -> bool:
        return _curves(figure, summary, "early_stop_iteration", 1, "early-stop iteration")

    def seconds(figure: Figure) -> bool:
        return _seconds(figure, summary["rounds"])

    def density(figure: Figure) -> bool:
        return _densities(figure, summary["rounds"])

    drawings: tuple[tuple[str, str, Callable[[Figure], bool]], ...] = (
        ("accuracy", "Test accuracy", accuracy),
        ("early_stop", "Early-stop iteration", early_stop),
        ("seconds", "Seconds per round", seconds),
        ("density", "Last round, layer by layer", density),
    )
    written = []
    with mpl.rc_context():  # restores what the two lines below change
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        for name, title, draw in drawings:
            figure = Figure()
            FigureCanvasAgg(figure)
            path = folder / f"{name}.png"
            if not draw(figure):
                path.unlink(missing_ok=True)  # of an earlier report
                continue
            figure.axes[0].set_title(f"{title} – {words.name(summary['config'])}", pad=12)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="png")
            written.append((title, f"{folder.name}/{path.name}"))
    return written


def series_style(number: int) -> tuple[str, str, Any]:
    """Colour, marker and line of a figure's series; the first is the ticket's."""
    styles = ((_BLUE, "o", "-"), *_CONTROL_STYLES)
    return styles[number % len(styles)]


def _points(rows: list[tuple[float, Any]], factor: float) -> tuple[list[float], list[float]]:
    good = [(100 * density, factor * y) for density, y in rows if density > 0 and words.finite(y)]
    return [x for x, _ in good], [y for _, y in good]


def _curves(figure: Any, summary: Summary, key: str, factor: float, label: str) -> bool:
    rounds = summary["rounds"]
    x, y = _points([(row["density"], row.get(key)) for row in rounds], factor)
    if len(x) < 2:  # a dense network alone is no curve
        return False
    axes = figure.add_subplot()
    if rounds[0]["round"] == 0 and words.finite(rounds[0].get(key)):
        dense = factor * rounds[0][key]
        axes.axhline(dense, color=_GREY, linewidth=1.2, linestyle="--", label="dense network")
    axes.plot(x, y, color=_BLUE, marker="o", label="ticket", zorder=3)
    shown = list(x)
    for i, name in enumerate(words.control_names(summary)):
        rows = [(row["density"], ((row.get("controls") or {}).get(name) or {}).get(key)) for row in rounds]
        xs, ys = _points(rows, factor)
        color, marker, dashes = series_style(i + 1)
        axes.plot(xs, ys, color=color, marker=marker, linestyle=dashes, label=words.control(name))
        shown += xs
    axes.set_ylabel(label)
    density_axis(axes, shown)
    axes.legend(loc="best")
    return True


def density_axis(axes: Any, densities: list[float]) -> None:
    """Weights remaining on a log axis that falls to the right, as in the paper, with ticks at real rounds."""
    from matplotlib.ticker import NullLocator

    values = sorted(set(densities), reverse=True)
    axes.set_xscale("log")
    low, high = values[-1], values[0]
    margin = (high / low) ** 0.03 if high > low else 1.5
    axes.set_xlim(high * margin, low / margin)
    span = math.log(high / low) or 1.0
    ticks = [high]
    for value in values[1:]:
        if math.log(ticks[-1] / value) >= span / 13:  # labels must not touch
            ticks.append(value)
    axes.set_xticks(ticks, [words.short(value / 100) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("weights remaining (%)")


def _seconds(figure: Any, rounds: list[dict]) -> bool:
    rows = [row for row in rounds if words.finite(row.get("train_seconds"))]
    if not rows:
        return False
    axes = figure.add_subplot()
    masked = [row["masked_dense_seconds"] if words.finite(row.get("masked_dense_seconds")) else 0 for row in rows]
    ours = [row["train_seconds"] for row in rows]
    at = range(len(rows))
    width = 0.4 if any(masked) else 0.7
    if any(masked):
        left = [i - width / 2 for i in at]
        axes.bar(left, masked, width, color="#C9CDD2", edgecolor=_GREY, hatch="///", label="masked dense")
    shift = width / 2 if any(masked) else 0.0
    axes.bar([i + shift for i in at], ours, width, color=_BLUE, label="sparsekit")
    every = 1 + (len(rows) - 1) // 13
    tallest = max(*ours, *masked)
    for i in at:
        speedup = rows[i].get("speedup")
        if i % every == 0 and words.finite(speedup) and masked[i]:
            top = max(ours[i], masked[i]) + 0.015 * tallest
            axes.text(i, top, f"{speedup:.1f}x", ha="center", fontsize=11, color=_INK)
    axes.set_xticks(list(at)[::every], [words.short(row["density"]) for row in rows[::every]])
    axes.set_ylim(0, (tallest or 1) * 1.25)  # room for the legend
    axes.set_xlabel("weights remaining (%)")
    axes.set_ylabel("seconds")
    axes.legend(loc="upper right", ncols=2)
    return True


def _densities(figure: Any, rounds: list[dict]) -> bool:
    layers = [x for x in (rounds[-1].get("layers") or ()) if words.finite(x.get("density"))] if rounds else []
    if not layers:
        return False
    figure.set_size_inches(8, max(2.8, 1.7 + 0.42 * len(layers)))
    axes = figure.add_subplot()
    values = [100 * layer["density"] for layer in layers]
    at = range(len(layers))
    axes.barh(list(at), values, 0.62, color=_BLUE)
    overall = 100 * rounds[-1]["density"]
    axes.axvline(overall, color=_ORANGE, linestyle="--", linewidth=1.4)
    room = max(*values, overall) or 1.0
    for i, layer in enumerate(layers):
        text = f"{words.short(layer['density'])} %  {layer.get('format') or ''}"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the dashed line may pass here
        axes.text(values[i] + 0.012 * room, i, text, va="center", fontsize=11, color=_INK, bbox=paper)
    axes.set_yticks(list(at), [str(layer.get("name", "?")) for layer in layers])
    axes.invert_yaxis()
    axes.set_xlim(0, room * 1.22)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_xlabel(f"weights remaining (%); dashed: the whole network, {words.short(overall / 100)} %")
    return True
