"""Figures of result files: ratio over density, and rates under the roofline. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

__all__ = ["crossover", "roofline"]

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8C8C8C")
_MARKERS = "os^Dv<>P"
_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
          "svg.fonttype": "none", "svg.hashsalt": "sparsekit", "text.parse_math": False}  # fmt: skip


def crossover(rows: Sequence[dict[str, Any]], work: str = "forward", most: int = 8) -> str | None:
    """SVG: best dense time over ours by sparsity, a line for each of the first ``most`` layers; None without any."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["work"] == work and row.get("p50_us") and row.get("suite") in ("hero", "layers", "blocks"):
            found.setdefault(row["name"].split("-d0")[0], {})[row["density"]] = row["ratio"]
    lines = {label: sorted(points.items()) for label, points in found.items() if len(points) > 2}
    if not lines:
        return None
    figure, axes = _figure()
    densities = sorted({density for points in lines.values() for density, _ in points})
    for i, (label, points) in enumerate(list(lines.items())[:most]):
        axes.plot(*zip(*points, strict=True), color=_COLORS[i % 8], marker=_MARKERS[i % 8], label=label)
    axes.axhline(1, color="#333333", linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="sparsity", ylabel="times as fast as the best dense")
    axes.set_xticks(densities, [f"{1 - density:.0%}" for density in densities])
    axes.invert_xaxis()
    axes.minorticks_off()
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if _within(tick, lines)]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_title(f"{work}: where sparse starts to pay (dashed: as fast as dense)", loc="left")
    axes.legend(fontsize=9)
    return _svg(figure)


def _within(tick: float, lines: dict[str, list[tuple[float, float]]]) -> bool:
    ratios = [ratio for points in lines.values() for _, ratio in points]
    return min(ratios) / 2 < tick < max(ratios) * 2


def roofline(rows: Sequence[dict[str, Any]], rates: dict[str, Any]) -> str | None:
    """SVG: GFLOP/s of survivors over FLOPs per byte moved, under the rates measured with them; None without any."""
    points = [row for row in rows if row.get("gflops") and row.get("moved") and row["dtype"] == "float32"]
    points = [row for row in points if row["suite"] != "overhead"]  # tiny ones, far below
    if not points:
        return None
    figure, axes = _figure()
    kinds = sorted({(row["op"], row["work"]) for row in points})
    for i, kind in enumerate(kinds):
        of = [row for row in points if (row["op"], row["work"]) == kind]
        axes.scatter([row["flops"] / row["moved"] for row in of], [row["gflops"] for row in of],
                     color=_COLORS[i % 8], marker=_MARKERS[i % 8], s=22, label=" ".join(kind))  # fmt: skip
    xs = [row["flops"] / row["moved"] for row in points]
    low, high = min(xs) / 2, max(xs) * 2
    peak = rates["flops"]["float32"] / 1e9
    sizes = sorted(rates["bytes"], key=int)
    for size, style in ((sizes[0], "-"), (sizes[-1], ":")):
        bandwidth = rates["bytes"][size] / 1e9
        ends = [low, min(max(peak / bandwidth, low), high), high]
        roof = [min(peak, x * bandwidth) for x in ends]
        axes.plot(ends, roof, style, color="#333333", linewidth=1.2, label=f"copies within {_size(int(size))}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of survivors per byte moved", ylabel="GFLOP/s of survivors")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("Under the highest rates seen in the same run", loc="left")
    axes.legend(fontsize=9)
    return _svg(figure)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _figure():
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()


def _svg(figure) -> str:
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
