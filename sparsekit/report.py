"""The report of a ticket search: ``summary.json`` → Markdown and figures in the manner of the papers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import words
from .figures import write_figures
from .words import Summary

__all__ = ["check_summary", "ledger_rows", "ledger_table", "read_summary", "write_report"]

_NUMBERS = (
    "test_accuracy",
    "val_loss",
    "early_stop_iteration",
    "train_seconds",
    "masked_dense_seconds",
    "speedup",
)
_INSTALL = "figures need matplotlib: pip install 'sparsekit[demo]'"

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
        figures = write_figures(summary, path.parent / "figures")
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
            if not words.finite(row[key]):
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
    head, rows = ledger_rows(summary)
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        *numbers, formats = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([*numbers, formats.strip()]))
    return "\n".join([*lines, _total(summary)])


def ledger_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """The ledger's head and its row per round, as text."""
    controls = words.control_names(summary)
    head = ["round", "weights %", "accuracy %", *(f"{words.control(c)} %" for c in controls)]
    head += ["early stop", "seconds", "masked-dense s", "speedup", "formats"]
    rows = []
    for row in summary["rounds"]:
        of_controls = (((row.get("controls") or {}).get(c) or {}).get("test_accuracy") for c in controls)
        rows.append(
            [
                str(row["round"]),
                words.weights(row),
                *(words.accuracy(value) for value in (row.get("test_accuracy"), *of_controls)),
                words.number(row.get("early_stop_iteration"), ".0f"),
                words.number(row.get("train_seconds"), ".1f"),
                words.number(row.get("masked_dense_seconds"), ".1f"),
                words.times(row.get("speedup")),
                words.formats(row),
            ]
        )
    return head, rows


def _markdown(summary: Summary, figures: list[tuple[str, str]], missing: str) -> str:
    config = summary["config"]
    lines = [
        f"# Ticket search: {words.cell(words.name(config))}",
        "",
        *(f"- {line}" for line in _headline(summary)),
        "",
    ]
    if config.get("note"):
        lines += [f"Data: {words.cell(config['note'])}.", ""]
    head, rows = ledger_rows(summary)
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
        how.append(f"{words.rate(config['rate'])} of the survivors a round")
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
    return [f"{words.cell(', '.join(how))}.{unfinished}", _verdict(rounds), _total(summary)]


def _verdict(rounds: list[dict]) -> str:
    known = [row for row in rounds if words.finite(row.get("test_accuracy"))]
    if not known or known[0]["round"] != 0:
        return "No test accuracy of the dense network was recorded, so no ticket can be judged."
    dense, tickets = known[0], known[1:]
    text = f"The dense network reaches {words.accuracy(dense['test_accuracy'])} %"
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
    text = f"{words.accuracy(row['test_accuracy'])} % at {words.percent(row['density'])} % of the weights"
    for name, control in (row.get("controls") or {}).items():
        if words.finite(control.get("test_accuracy")):
            text += f" ({words.control(name)} {words.accuracy(control['test_accuracy'])} %)"
    return text


def _total(summary: Summary) -> str:
    total = summary["total"]
    text = f"Training took {words.number(total.get('train_seconds'), '.1f')} s"
    if words.finite(total.get("masked_dense_seconds")):
        text += f"; masked dense would have taken {words.number(total['masked_dense_seconds'], '.1f')} s"
        text += f" ({words.times(total.get('speedup'))})" if words.finite(total.get("speedup")) else ""
    else:
        text += "; masked dense was not measured"
    if words.finite(total.get("overhead_seconds")):
        text += f"; pruning, planning, evaluation and saving {words.number(total['overhead_seconds'], '.1f')} s"
    if total.get("control_seconds"):
        text += f"; controls {words.number(total['control_seconds'], '.1f')} s"
    return text + "."


def _inference(found: dict[str, Any]) -> str:
    parts = []
    if words.finite(found.get("dense_us")) and words.finite(found.get("sparse_us")):
        batch = f"Batch {found['batch']}: " if found.get("batch") is not None else ""
        times = f"dense {found['dense_us']:.0f} µs, sparse {found['sparse_us']:.0f} µs"
        parts.append(f"{batch}{times}, {words.times(found.get('speedup'))} as fast")
    if words.finite(found.get("file_bytes")):
        dense = f" against {words.bytes(found['dense_bytes'])} dense" if words.finite(found.get("dense_bytes")) else ""
        parts.append(f"the file has {words.bytes(found['file_bytes'])}{dense}")
    text = "; ".join(parts)
    return text and text[0].upper() + text[1:] + "."


def _layers(summary: Summary) -> list[str]:
    layers = summary["rounds"][-1].get("layers") if summary["rounds"] else None
    if not layers:
        return ["No layers were recorded."]
    rows = [
        [
            str(layer.get("name", words.NONE)),
            "x".join(map(str, layer.get("shape") or [])) or words.NONE,
            words.percent(layer.get("density")),
            str(layer.get("format") or words.NONE),
        ]
        for layer in layers
    ]
    return _table(["layer", "shape", "weights %", "format"], rows, left=(0, 1, 3))


def _table(head: Row, rows: Sequence[Row], left: Sequence[int]) -> list[str]:
    rule = [":--" if i in left else "--:" for i in range(len(head))]
    return ["| " + " | ".join(map(words.cell, row)) + " |" for row in (head, rule, *rows)]


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
