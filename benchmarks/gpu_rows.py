"""Rows of ``gpu.py``: statistics, limits, the table. Plain Python, no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import limits
from gpu_cases import WORKS, Case, Layer


class Spread(NamedTuple):
    """Microseconds of a call on the device, and of queueing it on the host."""

    p20: float
    p50: float
    p80: float
    host: float

    @classmethod
    def of(cls, device: Sequence[float], host: Sequence[float]) -> Spread:
        """Percentiles of at least two samples."""
        fifths = statistics.quantiles(device, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(device), fifths[3], statistics.median(host))


def product(case: Case, layer: Layer, work: str) -> limits.Product:
    """The sparse product of a row."""
    itemsize = 4 if case.dtype in ("tf32", "float32") else 2
    k = layer.inputs * layer.taps
    return limits.Product(work, layer.positions, layer.out, k, case.density, itemsize, layer.taps)


def row(
    case: Case, work: str, facts: Mapping, spread: Spread, *, rivals: Mapping[str, float | str] | None = None,
    of: limits.Product | None = None, card: limits.Card | None = None, error: float | None = None,
    config: Mapping | None = None, shape: Sequence[int] = (), rate: float | None = None,
) -> dict:  # fmt: skip
    """A measured row, JSON-ready. ``rivals`` maps a name to microseconds, or to why it has none."""
    rivals = dict(rivals or {})
    dense = [us for name, us in rivals.items() if name.startswith("dense") and isinstance(us, float)]
    known = of is not None and card is not None and case.dtype in card.flops
    least = limits.limit(of, card, case.dtype) if known else None
    tile = 256 if min(case.block) >= 8 else 0  # tokens that kernels hold beside a block, by default on sm_90
    model = limits.model(of, case.block, tile, card, case.dtype) if known and tile else None
    return {
        **facts, "suite": case.suite, "case": case.name, "name": f"{case.name}-{work}", "layer": case.layer,
        "shape": list(shape), "block": list(case.block), "format": case.format, "density": case.density,
        "dtype": case.dtype, "work": work, "p20_us": spread.p20, "p50_us": spread.p50, "p80_us": spread.p80,
        "host_us": spread.host, "ratio": min(dense) / spread.p50 if dense else None, "rivals": rivals, "error": error,
        "bytes": of.bytes if of else None, "flops": of.flops if of else None, "rate": rate, "limit_us": least,
        "percent_of_limit": 100 * least / spread.p50 if least else None, "model_us": model,
        "config": dict(config or case.config), "failed": None,
    }  # fmt: skip


def failed(case: Case, work: str, reason: str, facts: Mapping | None = None) -> dict:
    """The row of what did not run, with the reason in ``failed``."""
    blank = row(case, work, facts or {}, Spread(0.0, 0.0, 0.0, 0.0))
    none = dict.fromkeys(("p20_us", "p50_us", "p80_us", "host_us"))
    return blank | none | {"failed": reason}


def read_rows(path: Path) -> list[dict]:
    """The rows written so far; a last line that a kill tore off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def card_of(rows: Iterable[dict]) -> limits.Card | None:
    """The card as its own ceilings measured it, or None before they did."""
    rates = {r["case"].split("/")[1]: r["rate"] for r in rows if r["suite"] == "ceilings" and not r["failed"]}
    if not {"copy", "gemm-bfloat16"} <= rates.keys():
        return None
    flops = {name.removeprefix("gemm-"): rate for name, rate in rates.items() if name.startswith("gemm-")}
    flops["bfloat16"] = max(rate for name, rate in rates.items() if name == "gemm-bfloat16" or name.startswith("conv-"))
    flops["float16"] = flops["bfloat16"]
    return limits.Card("measured", flops, rates["copy"], rates.get("l2-read") or rates.get("l2-copy") or rates["copy"])


def table(rows: Sequence[dict]) -> str:
    """Markdown: the ceilings in a line, a line per layer and mask, then what failed."""
    if not rows:
        return "no rows"
    known = next((r for r in rows if r.get("device")), rows[0])
    lines = [
        f"{known.get('device')}, driver {known.get('driver')}, torch {known.get('torch')}, "
        f"triton {known.get('triton')}, commit {known.get('commit')}{' (changed)' if known.get('dirty') else ''}",
        "",
    ]
    ceilings = [r for r in rows if r["suite"] == "ceilings" and not r["failed"]]
    if ceilings:
        shown = (f"{r['case'].split('/')[1]} {r['rate'] / 1e12:.3g} {_unit(r['case'])}" for r in ceilings)
        lines += ["Measured here: " + ", ".join(shown) + ".", ""]
    cases: dict[str, dict[str, dict]] = {}
    for r in rows:
        if r["suite"] == "layers" and not r["failed"]:
            cases.setdefault(r["case"], {})[r["work"]] = r
    if cases:
        lines += [
            "us (ratio: best dense / ours; % of the limit that survivors set). **Bold: sparse loses.**",
            "",
            "| case | " + " | ".join(WORKS) + " | other rivals of forward, us |",
            "|---|" + "---|" * (len(WORKS) + 1),
        ]
        for name, works in sorted(cases.items()):
            rivals = works.get("forward", {}).get("rivals", {})
            others = ", ".join(f"{key} {_us(us)}" for key, us in rivals.items() if not key.startswith("dense"))
            cells = " | ".join(_cell(works.get(work)) for work in WORKS)
            lines.append(f"| {name.removeprefix('layers/')} | {cells} | {others} |")
    sweep = [r for r in rows if r["suite"] == "experiments" and not r["failed"]]
    if sweep:
        lines += ["", "| experiment | us | % of limit | model us |", "|---|---|---|---|"]
        for r in sweep:
            share = f"{r['percent_of_limit']:.0f}" if r["percent_of_limit"] else ""
            model = f"{r['model_us']:.0f}" if r["model_us"] else ""
            lines.append(f"| {r['name'].removeprefix('experiments/')} | {r['p50_us']:.1f} | {share} | {model} |")
    broken = [r for r in rows if r["failed"]]
    if broken:
        lines += ["", "Without a time:"]
        lines += [f"- {r['case']} {r['work']}: {' '.join(r['failed'].split())[:200]}" for r in broken]
    return "\n".join(lines)


def _unit(case: str) -> str:
    return "TFLOP/s" if "gemm" in case or "conv" in case else "TB/s"


def _us(value: float | str) -> str:
    return f"{value:.0f}" if isinstance(value, float) else f"({value})"


def _cell(r: dict | None) -> str:
    if r is None:
        return ""
    ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}x" if r["ratio"] >= 1 else f"**{r['ratio']:.2f}x**"
    notes = [ratio, f"{r['percent_of_limit']:.0f} %" if r["percent_of_limit"] else ""]
    noted = ", ".join(filter(None, notes))
    return f"{r['p50_us']:.1f}" + (f" ({noted})" if noted else "")
