"""One HTML file that shows result files: a sortable table, a filter, figures; nothing is loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import read

__all__ = ["page", "write_page"]

_COLUMNS = ("suite", "case", "pattern", "format", "threads", "dense us", "sparse us", "ratio", "% of limit", "bound by",
            "bytes of dense", "strongest rival", "ratio to it", "not timed")  # fmt: skip
_TEXT = {0, 1, 2, 3, 9, 11, 13}

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1500px;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;font-size:13px}
th{position:sticky;top:0;background:#f3f4f6;text-align:left;padding:6px 8px;white-space:nowrap}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid #0072B2}
td{padding:4px 8px;border-bottom:1px solid #e5e7eb;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.loses td{background:#fdecea}svg{max-width:760px;height:auto}figure{margin:1rem 0;display:inline-block}
input{font:inherit;padding:4px 8px;margin:1rem 0;width:22rem}
"""
_SCRIPT = """
const body=document.querySelector('tbody'),heads=[...document.querySelectorAll('th')];
heads.forEach((head,i)=>head.querySelector('button').addEventListener('click',()=>{
  const up=head.getAttribute('aria-sort')!=='ascending';
  heads.forEach(h=>h.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort',up?'ascending':'descending');
  const key=row=>row.cells[i].dataset.v??row.cells[i].textContent;
  const number=row=>{const k=key(row);return k===''?NaN:Number(k)};
  const rows=[...body.rows],numeric=rows.every(row=>key(row)===''||!isNaN(number(row)));
  rows.sort((a,b)=>{
    if(key(a)===''||key(b)==='')return (key(a)==='')-(key(b)==='');
    return (numeric?number(a)-number(b):key(a).localeCompare(key(b)))*(up?1:-1)});
  body.append(...rows);
}));
document.querySelector('input').addEventListener('input',event=>{
  const words=event.target.value.toLowerCase().split(' ').filter(Boolean);
  for(const row of body.rows){
    const text=row.textContent.toLowerCase();
    row.hidden=!words.every(word=>text.includes(word));
  }
});
"""


def write_page(files: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page of some result files; raises FileNotFoundError or ValueError where one is none."""
    results = [read(path) for path in files]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(results), encoding="utf-8")
    return out


def page(results: Sequence[dict[str, Any]]) -> str:
    """The HTML text; without matplotlib it has no figures and says so."""
    rows = [row for found in results for row in found["rows"]]
    losing = sum(row["ratio"] < 1 for row in rows)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>sparsekit bench</title><style>{_STYLE}</style><h1>sparsekit against dense</h1>",
        *(f"<p>{_facts(found)}</p>" for found in results),
        f"<p>{len(rows)} rows, in {losing} of them sparse loses (red). Ratio: the best dense time over ours, medians "
        "of one interleaved run; every row's result was checked against float64 before it was timed. Limit: the time "
        "that the survivors' arithmetic or the bytes moved would take at the highest rates seen in the same run.</p>",
        *_figures(results),
        "<label>Filter <input placeholder='linear step 16x1' aria-label=filter></label>",
        "<table><thead><tr>" + "".join(f"<th scope=col><button>{c}</button></th>" for c in _COLUMNS),
        "</tr></thead><tbody>",
        *(_row(row) for row in rows),
        f"</tbody></table><script>{_SCRIPT}</script></html>",
    ]
    return "\n".join(parts)


def _facts(found: dict[str, Any]) -> str:
    facts = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items())
    changed = " (changed)" if facts.get("dirty") else ""
    text = (
        f"{facts.get('cpu')} ({facts.get('device')}), {facts.get('date')}, commit {facts.get('commit')}{changed}, "
        f"torch {facts.get('torch')}, {versions}"
    )
    failed = found.get("failed") or {}
    return html.escape(text + "".join(f"; NOT TIMED {name}: {why}" for name, why in failed.items()))


def _figures(results: Sequence[dict[str, Any]]) -> list[str]:
    try:
        from . import figures

        found = []
        for result in results:
            rows = result["rows"]
            for threads in sorted({row["threads"] for row in rows}):
                of = [row for row in rows if row["threads"] == threads]
                drawn = [figures.crossover(of, work) for work in ("forward", "step")]
                rates = (result.get("limits") or {}).get(str(threads))
                drawn.append(figures.roofline(of, rates) if rates else None)
                found += [f"<figure>{svg}<figcaption>Threads: {threads}</figcaption></figure>" for svg in drawn if svg]
        return found
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return ["<p>No figures: they need matplotlib: pip install 'sparsekit[demo]'.</p>"]


def _row(row: dict[str, Any]) -> str:
    rivals = {name: spread[1] if isinstance(spread, list) else spread for name, spread in row["rivals"].items()}
    strongest = min(rivals, key=rivals.__getitem__) if rivals else ""
    ours = row.get("p50_us") or row.get("sparse_us")  # files of before 0.2 had medians only
    cells = [
        row.get("suite", ""), row["name"], row.get("pattern", ""), row.get("format", ""), row["threads"],
        row.get("dense_us"), ours, row["ratio"], row.get("percent_of_limit"), row.get("limit") or "",
        row["bytes"] / row["dense_bytes"], strongest, rivals[strongest] / ours if strongest and ours else None,
        "; ".join(f"{name}: {why}" for name, why in (row.get("notes") or {}).items()),
    ]  # fmt: skip
    text = "".join(_cell(value, i) for i, value in enumerate(cells))
    return f"<tr{' class=loses' if row['ratio'] < 1 else ''}>{text}</tr>"


def _cell(value: Any, column: int) -> str:
    if column in _TEXT:
        return f"<td>{html.escape(str(value))}</td>"
    if value is None:
        return "<td class=n data-v=''></td>"
    shown = {7: f"{value:.2f}x", 12: f"{value:.2f}x", 8: f"{value:.0f}", 10: f"{value:.2f}", 4: f"{value}"}
    return f"<td class=n data-v={value:.6g}>{shown.get(column, f'{value:.1f}')}</td>"
