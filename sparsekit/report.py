"""The report of a ticket search: ``summary.json`` → Markdown and figures in the manner of the papers."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_summary", "ledger_table", "read_summary", "write_report"]

_NONE = "–"
_CONTROLS = {"reinit": "re-init", "random": "random mask"}  # how the papers call them; others go by their key
_NUMBERS = (
    "test_accuracy",
    "val_loss",
    "early_stop_iteration",
    "train_seconds",
    "masked_dense_seconds",
    "speedup",
)
_INSTALL = "figures need matplotlib: pip install 'sparsekit[demo]'"

Summary = dict[str, Any]
Row = Sequence[str]


def write_report(run_dir: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the report of a run and return its path.

    ``RUN/report.md`` (or ``out``, a Markdown file elsewhere) with its figures as PNG in ``figures/``
    beside it. Without matplotlib the report has no figures and says so.

    Raises: FileNotFoundError without a ``summary.json``; ValueError when it is torn or foreign. Both
    before anything is written.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir)
    path = run_dir / "report.md" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figures = _write_figures(summary, path.parent / "figures")
        missing = ""
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        figures, missing = [], f"No figures: {_INSTALL}."
    _write_text(path, _markdown(summary, figures, missing))
    return path


def read_summary(run_dir: str | Path) -> Summary:
    """``summary.json`` of a run directory, checked; raises as :func:`write_report` does."""
    path = Path(run_dir) / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Expected the summary of a ticket search, got no such file")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of the encoding
        raise ValueError(f"{path}: Expected JSON, got a torn or foreign file ({error})") from None
    try:
        check_summary(summary)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return summary


def check_summary(summary: Any) -> None:
    """Raise ValueError that names the entry unless ``summary`` has the shape of a search's summary."""
    _expect(summary, dict, "a summary")
    for key, kind in (("config", dict), ("rounds", list), ("total", dict)):
        _expect(summary.get(key), kind, key)
    for i, row in enumerate(summary["rounds"]):
        at = f"rounds[{i}]"
        _expect(row, dict, at)
        for key in ("round", "density"):
            _expect_number(row.get(key), f"{at}.{key}")
            if not _finite(row[key]):
                raise ValueError(f"{at}.{key}: Expected a finite number, got {row[key]}")
        _check_numbers(row, _NUMBERS, at)
        for j, layer in enumerate(_optional(row, "layers", list, at)):
            _expect(layer, dict, f"{at}.layers[{j}]")
            _optional(layer, "shape", list, f"{at}.layers[{j}]")
            _check_numbers(layer, ("density",), f"{at}.layers[{j}]")
        for name, control in _optional(row, "controls", dict, at).items():
            _expect(control, dict, f"{at}.controls.{name}")
            _check_numbers(control, _NUMBERS, f"{at}.controls.{name}")
    for part in (summary["total"], _optional(summary, "inference", dict, "")):
        measured = [key for key in part if key.endswith(("seconds", "speedup", "_us", "_bytes"))]
        _check_numbers(part, measured, "total" if part is summary["total"] else "inference")


def _optional(parent: dict, key: str, kind: type, at: str) -> Any:
    """An entry that may be missing or null, which then counts as empty."""
    if parent.get(key) is None:
        return kind()
    _expect(parent[key], kind, f"{at}.{key}".lstrip("."))
    return parent[key]


def _check_numbers(entry: dict, keys: Iterable[str], at: str) -> None:
    for key in keys:
        if entry.get(key) is not None:
            _expect_number(entry[key], f"{at}.{key}")


def _expect(value: Any, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        word = {dict: "an object", list: "a list"}[kind]
        raise ValueError(f"{name}: Expected {word}, got {'nothing' if value is None else repr(value)[:60]}")


def _expect_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: Expected a number, got {'nothing' if value is None else repr(value)[:60]}")


# Text


def ledger_table(summary: Summary) -> str:
    """The ledger as plain text for a terminal: a row per round, then the totals."""
    head, rows = _ledger(summary)
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        *numbers, formats = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*numbers, formats.strip()]))
    return "\n".join([*lines, _total(summary)])


def _ledger(summary: Summary) -> tuple[list[str], list[list[str]]]:
    controls = _control_names(summary)
    head = ["round", "weights %", "accuracy %", *(f"{_control(c)} %" for c in controls)]
    head += ["early stop", "seconds", "masked-dense s", "speedup", "formats"]
    rows = []
    for row in summary["rounds"]:
        of_controls = (((row.get("controls") or {}).get(c) or {}).get("test_accuracy") for c in controls)
        rows.append(
            [
                str(row["round"]),
                _percent(row["density"]),
                *(_accuracy(value) for value in (row.get("test_accuracy"), *of_controls)),
                _number(row.get("early_stop_iteration"), ".0f"),
                _number(row.get("train_seconds"), ".1f"),
                _number(row.get("masked_dense_seconds"), ".1f"),
                _times(row.get("speedup")),
                _formats(row),
            ]
        )
    return head, rows


def _markdown(summary: Summary, figures: list[tuple[str, str]], missing: str) -> str:
    config = summary["config"]
    lines = [
        f"# Ticket search: {_cell(_name(config))}",
        "",
        *(f"- {line}" for line in _headline(summary)),
        "",
    ]
    if config.get("note"):
        lines += [f"Data: {_cell(config['note'])}.", ""]
    head, rows = _ledger(summary)
    lines += ["## Ledger", "", *_table(head, rows, left=(len(head) - 1,)), "", _total(summary), ""]
    if inference := _inference(summary.get("inference") or {}):
        lines += ["## Inference", "", inference, ""]
    lines += [f"## Layers in round {summary['rounds'][-1]['round']}", ""] if summary["rounds"] else []
    lines += [*_layers(summary), ""]
    lines += ["## Figures", ""] + ([missing, ""] if missing else [])
    if not figures and not missing:
        lines += ["No figures: no round has a number to draw.", ""]
    for title, path in figures:
        lines += [f"![{title}]({path})", ""]
    lines += ["<!-- made by `sparsekit report` from summary.json -->", ""]
    return "\n".join(lines)


def _headline(summary: Summary) -> list[str]:
    """Three lines: what was done, what was found, what it cost."""
    config, rounds = summary["config"], summary["rounds"]
    pattern = str(config.get("pattern") or "unstructured")
    how = [f"{pattern[:1].upper()}{pattern[1:]} pruning by {config.get('criterion') or 'magnitude'}"]
    if config.get("rate") is not None:
        how.append(f"{_rate(config['rate'])} of the survivors a round")
    on_cpu = config.get("device") in (None, "cpu")
    facts = {
        "scope {}": config.get("scope"),
        "rewind {}": config.get("rewind"),
        "{} iterations a round": config.get("iterations"),
        "seed {}": config.get("seed"),
        "on {}": (config.get("cpu") if on_cpu else None) or config.get("device"),
        "{} threads": config.get("threads"),
    }
    how += [text.format(value) for text, value in facts.items() if value is not None]
    wanted = config.get("rounds")
    unfinished = ""
    if isinstance(wanted, int) and len(rounds) < wanted + 1:
        unfinished = f" Unfinished: {len(rounds)} of {wanted + 1} rounds, the dense one included."
    return [f"{_cell(', '.join(how))}.{unfinished}", _verdict(rounds), _total(summary)]


def _verdict(rounds: list[dict]) -> str:
    known = [row for row in rounds if _finite(row.get("test_accuracy"))]
    if not known or known[0]["round"] != 0:
        return "No test accuracy of the dense network was recorded, so no ticket can be judged."
    dense, tickets = known[0], known[1:]
    text = f"The dense network reaches {_accuracy(dense['test_accuracy'])} %"
    if not tickets:
        return f"{text}; no pruned network was tested."
    matching = [row for row in tickets if row["test_accuracy"] >= dense["test_accuracy"]]
    if not matching:
        best = max(tickets, key=lambda row: row["test_accuracy"])
        return f"{text}; no ticket matches it, the best has {_ticket(best)}."
    best = max(matching, key=lambda row: row["test_accuracy"])
    smallest = min(matching, key=lambda row: row["density"])
    text += f"; in this run the smallest ticket not below it has {_ticket(smallest)}"
    text += "." if best is smallest else f"; the best has {_ticket(best)}."
    return text


def _ticket(row: dict) -> str:
    text = f"{_accuracy(row['test_accuracy'])} % at {_percent(row['density'])} % of the weights"
    for name, control in (row.get("controls") or {}).items():
        if _finite(control.get("test_accuracy")):
            text += f" ({_control(name)} {_accuracy(control['test_accuracy'])} %)"
    return text


def _total(summary: Summary) -> str:
    total = summary["total"]
    text = f"Training took {_number(total.get('train_seconds'), '.1f')} s"
    if _finite(total.get("masked_dense_seconds")):
        text += f"; masked dense would have taken {_number(total['masked_dense_seconds'], '.1f')} s"
        text += f" ({_times(total.get('speedup'))})" if _finite(total.get("speedup")) else ""
    else:
        text += "; masked dense was not measured"
    if _finite(total.get("overhead_seconds")):
        text += f"; pruning, planning, evaluation and saving {_number(total['overhead_seconds'], '.1f')} s"
    if total.get("control_seconds"):
        text += f"; controls {_number(total['control_seconds'], '.1f')} s"
    return text + "."


def _inference(found: dict[str, Any]) -> str:
    parts = []
    if _finite(found.get("dense_us")) and _finite(found.get("sparse_us")):
        batch = f"Batch {found['batch']}: " if found.get("batch") is not None else ""
        times = f"dense {found['dense_us']:.0f} µs, sparse {found['sparse_us']:.0f} µs"
        parts.append(f"{batch}{times}, {_times(found.get('speedup'))} as fast")
    if _finite(found.get("file_bytes")):
        dense = f" against {_bytes(found['dense_bytes'])} dense" if _finite(found.get("dense_bytes")) else ""
        parts.append(f"the file has {_bytes(found['file_bytes'])}{dense}")
    text = "; ".join(parts)
    return text and text[0].upper() + text[1:] + "."


def _layers(summary: Summary) -> list[str]:
    layers = summary["rounds"][-1].get("layers") if summary["rounds"] else None
    if not layers:
        return ["No layers were recorded."]
    rows = [
        [
            str(layer.get("name", _NONE)),
            "x".join(map(str, layer.get("shape") or [])) or _NONE,
            _percent(layer.get("density")),
            str(layer.get("format") or _NONE),
        ]
        for layer in layers
    ]
    return _table(["layer", "shape", "weights %", "format"], rows, left=(0, 1, 3))


def _table(head: Row, rows: Sequence[Row], left: Sequence[int]) -> list[str]:
    rule = [":--" if i in left else "--:" for i in range(len(head))]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, rule, *rows)]


def _cell(text: Any) -> str:
    """Names come from files: keep them from breaking a table or becoming HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _name(config: dict[str, Any]) -> str:
    model, data = config.get("model"), config.get("data")
    return f"{model or 'a model'} on {data}" if data else str(model or "a model")


def _control(name: str) -> str:
    return _CONTROLS.get(name, name)


def _control_names(summary: Summary) -> list[str]:
    return list(dict.fromkeys(name for row in summary["rounds"] for name in row.get("controls") or {}))


def _rate(rate: Any) -> str:
    if not isinstance(rate, dict):
        return f"{_short(rate)} %" if _finite(rate) else str(rate)
    parts = [f"`{pattern}` {_short(value)} %" for pattern, value in rate.items() if pattern != "*"]
    if "*" not in rate:
        return ", ".join(parts)
    return f"{_short(rate['*'])} %" + (f" ({', '.join(parts)})" if parts else "")


def _formats(row: dict) -> str:
    counts = Counter(str(layer.get("format") or "?") for layer in row.get("layers") or ())
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.items()) or _NONE


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if _finite(value) else _NONE


def _percent(share: Any) -> str:
    """A share as per cent with three digits that matter: 100.0, 51.3, 3.57, 0.0123."""
    if not _finite(share):
        return _NONE
    value = 100 * share
    if value == 0 or value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.995 else f"{value:.3g}"


def _short(share: Any) -> str:
    return _percent(share).removesuffix(".0").removesuffix(".00")


def _accuracy(share: Any) -> str:
    return f"{100 * share:.2f}" if _finite(share) else _NONE


def _times(ratio: Any) -> str:
    return f"{ratio:.2f}x" if _finite(ratio) else _NONE


def _bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def _write_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# Figures: 8 inches wide, so that 11 points stay readable at 800 pixels. Colours of Okabe and Ito, which
# colour-blind readers can tell apart; every series also has its own marker and line.

_BLUE, _ORANGE, _GREEN, _GREY, _INK = "#0072B2", "#D55E00", "#009E73", "#8C8C8C", "#333333"
_PURPLE = "#CC79A7"
_CONTROL_STYLES = (
    (_ORANGE, "s", (0, (5, 2))),
    (_GREEN, "^", (0, (1, 1.5))),
    (_PURPLE, "D", (0, (3, 1, 1, 1))),
)
_STYLE = {
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


def _write_figures(summary: Summary, folder: Path) -> list[tuple[str, str]]:
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
        mpl.rcParams.update(_STYLE)
        for name, title, draw in drawings:
            figure = Figure()
            FigureCanvasAgg(figure)
            path = folder / f"{name}.png"
            if not draw(figure):
                path.unlink(missing_ok=True)  # of an earlier report
                continue
            figure.axes[0].set_title(f"{title} – {_name(summary['config'])}", pad=12)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="png")
            written.append((title, f"{folder.name}/{path.name}"))
    return written


def _points(rows: list[tuple[float, Any]], factor: float) -> tuple[list[float], list[float]]:
    good = [(100 * density, factor * y) for density, y in rows if density > 0 and _finite(y)]
    return [x for x, _ in good], [y for _, y in good]


def _curves(figure: Any, summary: Summary, key: str, factor: float, label: str) -> bool:
    rounds = summary["rounds"]
    x, y = _points([(row["density"], row.get(key)) for row in rounds], factor)
    if len(x) < 2:  # a dense network alone is no curve
        return False
    axes = figure.add_subplot()
    if rounds[0]["round"] == 0 and _finite(rounds[0].get(key)):
        dense = factor * rounds[0][key]
        axes.axhline(dense, color=_GREY, linewidth=1.2, linestyle="--", label="dense network")
    axes.plot(x, y, color=_BLUE, marker="o", label="ticket", zorder=3)
    shown = list(x)
    for i, name in enumerate(_control_names(summary)):
        rows = [(row["density"], ((row.get("controls") or {}).get(name) or {}).get(key)) for row in rounds]
        xs, ys = _points(rows, factor)
        color, marker, dashes = _CONTROL_STYLES[i % len(_CONTROL_STYLES)]
        axes.plot(xs, ys, color=color, marker=marker, linestyle=dashes, label=_control(name))
        shown += xs
    axes.set_ylabel(label)
    _density_axis(axes, shown)
    axes.legend(loc="best")
    return True


def _density_axis(axes: Any, densities: list[float]) -> None:
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
    axes.set_xticks(ticks, [_short(value / 100) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("weights remaining (%)")


def _seconds(figure: Any, rounds: list[dict]) -> bool:
    rows = [row for row in rounds if _finite(row.get("train_seconds"))]
    if not rows:
        return False
    axes = figure.add_subplot()
    masked = [row["masked_dense_seconds"] if _finite(row.get("masked_dense_seconds")) else 0 for row in rows]
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
        if i % every == 0 and _finite(speedup) and masked[i]:
            top = max(ours[i], masked[i]) + 0.015 * tallest
            axes.text(i, top, f"{speedup:.1f}x", ha="center", fontsize=11, color=_INK)
    axes.set_xticks(list(at)[::every], [_short(row["density"]) for row in rows[::every]])
    axes.set_ylim(0, (tallest or 1) * 1.25)  # room for the legend
    axes.set_xlabel("weights remaining (%)")
    axes.set_ylabel("seconds")
    axes.legend(loc="upper right", ncols=2)
    return True


def _densities(figure: Any, rounds: list[dict]) -> bool:
    layers = [x for x in (rounds[-1].get("layers") or ()) if _finite(x.get("density"))] if rounds else []
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
        text = f"{_short(layer['density'])} %  {layer.get('format') or ''}"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the dashed line may pass here
        axes.text(values[i] + 0.012 * room, i, text, va="center", fontsize=11, color=_INK, bbox=paper)
    axes.set_yticks(list(at), [str(layer.get("name", "?")) for layer in layers])
    axes.invert_yaxis()
    axes.set_xlim(0, room * 1.22)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_xlabel(f"weights remaining (%); dashed: the whole network, {_short(overall / 100)} %")
    return True
