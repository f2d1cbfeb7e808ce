"""The figure of a recipe: our curves with their range over seeds, and the paper's numbers as hollow marks beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..figures import STYLE, density_axis, series_style
from ..files import read_json, write_json

__all__ = ["Curve", "Panel", "draw", "over_seeds", "redraw"]

_MARKERS = 20  # on a curve at most; more run into each other


@dataclass(frozen=True)
class Curve:
    """``y`` over ``x`` with a band from ``low`` to ``high``; of the paper's own numbers marks without a line."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    paper: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes; ``densities`` makes x weights remaining in percent, ``ticks`` names its places."""

    x: str
    y: str
    curves: list[Curve]
    densities: bool = False
    ticks: Sequence[str] = ()
    level: float | None = None


def over_seeds(name: str, x: Sequence[float], runs: Sequence[Sequence[float]]) -> Curve:
    """The mean of ``runs`` (one per seed, each as long as ``x``) and the range over them."""
    columns = list(zip(*runs, strict=True))
    means = [sum(column) / len(column) for column in columns]
    return Curve(name, list(x), means, list(map(min, columns)), list(map(max, columns)))


def draw(folder: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the numbers to ``figure.json`` and, where matplotlib is installed, the drawing to ``figure.png``."""
    write_json(folder / "figure.json", {"title": title, "panels": [asdict(panel) for panel in panels]})
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        (folder / "figure.png").unlink(missing_ok=True)  # of an earlier run
        return
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(8, 4.4 * len(panels)))
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=13)
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _paint(axes, panel)
        figure.savefig(folder / "figure.png", format="png")


def redraw(folder: Path) -> None:
    """Draw the numbers of ``figure.json`` anew."""
    kept = read_json(folder / "figure.json")
    panels = [Panel(**panel | {"curves": [Curve(**curve) for curve in panel["curves"]]}) for panel in kept["panels"]]
    draw(folder, kept["title"], panels)


def _paint(axes: Any, panel: Panel) -> None:
    for number, curve in enumerate(panel.curves):
        color, marker, dashes = series_style(number)
        if curve.paper:
            hollow = {"color": "#333333", "markersize": 13, "fillstyle": "none", "zorder": 4}
            axes.plot(curve.x, curve.y, "*", label=curve.name, **hollow)
            continue
        line = "none" if panel.ticks else dashes
        every = max(1, len(curve.x) // _MARKERS)
        axes.plot(curve.x, curve.y, color=color, marker=marker, markevery=every, linestyle=line, label=curve.name)
        if panel.ticks and curve.low:
            axes.vlines(curve.x, curve.low, curve.high, color=color, linewidth=1.2)
        elif curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    if panel.level is not None:
        axes.axhline(panel.level, color="#8C8C8C", linewidth=1, linestyle="--")
    axes.set_ylabel(panel.y)
    if panel.densities:
        density_axis(axes, [x for curve in panel.curves for x in curve.x])
    else:
        axes.set_xlabel(panel.x)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=30, ha="right", fontsize=9)
    below = -0.34 if panel.ticks else -0.17
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), fontsize=9, ncols=3)
