"""The verdicts of recipes that were run, kept in the repository: benchmarks/results/reproduce, one page over all.

    python benchmarks/verdicts.py runs/reproduce/lenet-short runs/reproduce/zhou-short

Copies each run's table and numbers to NAME-SCALE there, draws its figure (at most 100 KB) and writes README.md anew
from all that lie there, so no number is typed by hand. A ``remark.md`` in such a folder stays, and is shown below its
table. ``--commit`` names the commit that ran, where it was not the last one before the run ended.
"""

from __future__ import annotations

import argparse
import io
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from sparsekit.files import read_json, write_json
from sparsekit.reproduce import RECIPES, Check
from sparsekit.reproduce.base import rows
from sparsekit.reproduce.figure import redraw

ROOT = Path(__file__).resolve().parent
PAGE = ROOT / "results/reproduce/README.md"
_BYTES = 100_000


def gather(run: Path, commit: str | None) -> Path:
    """Keep a finished run's small files; returns their folder."""
    source = run / "checks.json"
    if not source.exists():
        raise FileNotFoundError(f"{run}: Expected a recipe that has ended, got no checks.json")
    found, ended = read_json(source), datetime.fromtimestamp(source.stat().st_mtime, UTC)
    found |= {"date": f"{ended:%Y-%m-%d}", "commit": commit or found.get("commit") or _commit_before(ended)}
    folder = PAGE.parent / f"{found['recipe']}-{found['scale']}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "checks.json", found)
    for name in ("figure.json", "figure.png"):
        (folder / name).unlink(missing_ok=True)
    if (run / "figure.json").exists():
        (folder / "figure.json").write_bytes((run / "figure.json").read_bytes())
        redraw(folder)
        (folder / "figure.png").write_bytes(_small((folder / "figure.png").read_bytes()))
    (folder / "checks.md").write_text("\n".join(section(folder, 1)), encoding="utf-8")
    return folder


def section(folder: Path, level: int) -> list[str]:
    """A run as lines of Markdown under a heading of that level."""
    found = read_json(folder / "checks.json")
    name, where = found["recipe"], "" if level == 1 else f"{folder.name}/"
    facts = f"{found['cpu']}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}, torch {found['torch']}"
    lines = [f"{'#' * level} {name} ({found['scale']})", "", RECIPES[name].about, "", f"Source: {found['source']}."]
    lines += [f"Ours: {facts}, {found['date']}, commit {found['commit']}.", ""]
    lines += [*rows([Check(**check) for check in found["checks"]]), ""]
    if (remark := folder / "remark.md").exists():
        lines += [remark.read_text(encoding="utf-8").strip(), ""]
    return lines + ([f"![{name}]({where}figure.png)", ""] if (folder / "figure.png").exists() else [])


def page() -> str:
    """Everything that was gathered, in the order of ``sparsekit reproduce``."""
    order = list(RECIPES)
    kept = {path: read_json(path) for path in PAGE.parent.glob("*/checks.json")}
    kept = dict(sorted(kept.items(), key=lambda item: (order.index(item[1]["recipe"]), item[1]["scale"])))
    decided = [check["passed"] for found in kept.values() for check in found["checks"] if check["passed"] is not None]
    failed = [path.parent.name for path, found in kept.items() if not _passed(found)]
    lines = ["# The papers' experiments, as they came out here", ""]
    lines += ["Written by `benchmarks/verdicts.py` from run directories of `sparsekit reproduce`.", ""]
    lines += [f"{sum(decided)} of {len(decided)} claims hold. Recipes with one that does not: {_words(failed)}."]
    ran = {found["recipe"] for found in kept.values()}
    lines += [f"Recipes that were not run: {_words([name for name in order if name not in ran])}.", ""]
    for path in kept:
        lines += section(path.parent, 2)
    return "\n".join(lines)


def _passed(found: dict) -> bool:
    return all(check["passed"] is not False for check in found["checks"])


def _words(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _commit_before(moment: datetime) -> str:
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", f"--before={moment.isoformat()}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"


def _small(png: bytes) -> bytes:
    """The picture in few colours, halved until it is small enough."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    while True:
        buffer = io.BytesIO()
        image.quantize(128).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= _BYTES:
            return buffer.getvalue()
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--commit", help="that ran them")
    args = parser.parse_args()
    for run in args.runs:
        print(gather(run, args.commit))
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
