"""Every result file of a device as Markdown tables, from the files alone.

    python benchmarks/tables.py benchmarks/results/DEVICE

Writes README.md there: per suite and number of threads, each row's ratio to the best dense torch of its own run, with
the share of this processor's measured limit (arithmetic or bytes) that the sparse call reaches. Losses are bold.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

HEAD = """# {device}

Ratio to the best dense torch of the same interleaved run (median time; for `memory`, bytes); in brackets the share of
the measured limit of this processor, arithmetic or bytes, that the sparse call reaches, where both are known. **Bold:
sparse loses** with its format forced, and `convert` would keep the layer dense. Written by `benchmarks/tables.py`.
"""


def tables(results: dict[str, Any], label: str) -> list[str]:
    """One table per suite, work and number of threads of a result file."""
    groups: dict[tuple[str, str, int], dict[str, dict[float, str]]] = {}
    for row in results["rows"]:
        name = re.sub(rf"-d[\d.e-]+-{row['work']}$", "", row["name"])
        cells = groups.setdefault((row.get("suite", label), row["work"], row["threads"]), {})
        cells.setdefault(name, {})[row["density"]] = _cell(row)
    facts = results["environment"]
    lines = []
    for (suite, work, threads), rows in groups.items():
        densities = sorted({density for cells in rows.values() for density in cells}, reverse=True)
        lines += [f"## {suite}, {work}, {threads} thread{'s' * (threads > 1)}", ""]
        lines += [f"`{label}.json`, commit {facts['commit']}, torch {facts['torch']}, {facts['date']}.", ""]
        lines += ["| | " + " | ".join(f"{1 - density:.0%}" for density in densities) + " |"]
        lines += ["|---|" + "---|" * len(densities)]
        for name, cells in rows.items():
            lines.append(f"| {name} | " + " | ".join(cells.get(density, "") for density in densities) + " |")
        lines.append("")
    return lines


def _cell(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:.2f}" if row["ratio"] < 10 else f"{row['ratio']:.1f}"
    share = row.get("percent_of_limit")
    return (f"**{ratio}**" if row["ratio"] < 1 else ratio) + (f" ({share:.0f} %)" if share else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines = [HEAD.format(device=folder.resolve().name)]
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if all("ratio" in row and "work" in row for row in results.get("rows", [{}])):
            lines += tables(results, path.stem)
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{folder / 'README.md'}: {len(lines)} lines")


if __name__ == "__main__":
    main()
