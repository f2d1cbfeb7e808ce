"""Everything worth knowing about one GPU in one command: its ceilings, its dense rivals, our kernels.

    make gpu-bench PY=python3 OUT=results            # or, installed: python benchmarks/gpu.py --out results
    python benchmarks/gpu.py --out results --minutes 5 --quick
    python benchmarks/gpu.py --out results --experiments       # launch configurations of the block kernels

Cases come most valuable first and each row is written to OUT/rows.jsonl at once, so whatever time allows is
kept; OUT/gpu.md is the table. Cases run in a worker process: a case that kills it (an illegal address, a
hang) becomes an error row and the next worker goes on behind it. The same command in the same OUT resumes.

A row is timed only after its result agreed with float64 on a slice. Times are GPU events around single calls,
ours and rivals in turn, on input sets that together exceed three times the L2; the GPU is kept busy
while the calls are queued, so launch overhead is not in ``p50_us`` but in ``host_us``. ``ratio`` is the
best dense time over ours; dense runs on the same masked weight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_cases import experiments, quick, suite
from gpu_rows import card_of, read_rows, table

ROOT = Path(__file__).resolve().parent.parent
_ROW_SECONDS = 300  # a row that takes longer hangs
_GRACE = 30  # seconds over the budget that the last case may take
_STUCK = 75  # a worker's exit status after an error that leaves its GPU context unusable
_NEEDED = {
    "bench": ("torch", "triton", "numpy", "safetensors", "setuptools"),
    "test": ("torch", "triton", "numpy", "safetensors", "setuptools", "pytest", "hypothesis"),
}


def missing(what: str) -> str | None:
    """Which packages this Python lacks for ``bench`` or ``test`` and how to bring them without a network."""
    from importlib.util import find_spec

    absent = [name for name in _NEEDED[what] if find_spec(name) is None]
    if not absent:
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = " ".join(absent)
    return (
        f"Expected {', '.join(_NEEDED[what])} for gpu-{what}, got a Python ({sys.executable}) without {names}.\n"
        "On a machine with a network:\n"
        f"  python3 -m pip download --only-binary=:all: --python-version {version} -d wheels {names}\n"
        f"Copy wheels/ here, then:\n  {sys.executable} -m pip install --no-index --find-links wheels {names}"
    )


def no_gpu() -> str | None:
    """Why there is nothing to measure here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    return f"Expected a GPU that torch can use, got torch {torch.__version__} without one; see python -m sparsekit info"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--quick", action="store_true", help="the first cases only, without torch.compile")
    parser.add_argument("--experiments", action="store_true", help="sweep launch configurations instead")
    parser.add_argument("--filter", default="", help="only cases whose name holds this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a dry run, on a CPU too")
    parser.add_argument("--check", choices=sorted(_NEEDED), help="only name the packages that are missing")
    parser.add_argument("--worker", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def chosen(args: argparse.Namespace) -> list:
    """The cases to run, most valuable first."""
    cases = experiments() if args.experiments else suite()
    if args.quick:
        cases = quick(cases)
    return [case for case in cases if args.filter in case.name]


def work(args: argparse.Namespace) -> int:
    """The worker: run what has no row yet, one case after another, until the deadline."""
    import torch
    from gpu_bench import Bench

    rows_file, current = args.out / "rows.jsonl", args.out / "current"
    os.environ["SPARSEKIT_CACHE"] = str((args.out / "cache").resolve())  # tuned on this card, kept with its rows
    bench = Bench(torch.device(args.device), tiny=args.tiny, compiled=not args.quick)
    done = {row["case"] for row in read_rows(rows_file)}
    for case in chosen(args):
        if case.name in done or case.format not in bench.formats:
            continue
        if time.time() > args.worker:
            print("time is up", flush=True)
            break
        current.write_text(case.name)
        started, broken = time.time(), False
        bench.card = card_of(read_rows(rows_file))
        for row in bench.rows(case):
            _append(rows_file, row)
            os.utime(current)  # the supervisor's sign of life
            broken = broken or bool(row["failed"] and "CUDA error" in row["failed"])
            print(_line(row), flush=True)
        print(f"  {case.name}: {time.time() - started:.0f} s", flush=True)
        if broken:
            return _STUCK
    current.unlink(missing_ok=True)
    return 0


def _append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _line(row: dict) -> str:
    if row["failed"]:
        return f"{row['case']} {row['work']}: {row['failed'].splitlines()[0][:160]}"
    ratio = f", {row['ratio']:.2f}x dense" if row["ratio"] else ""
    share = f", {row['percent_of_limit']:.0f} % of its limit" if row["percent_of_limit"] else ""
    return f"{row['case']} {row['work']}: {row['p50_us']:.1f} us{ratio}{share}"


def supervise(args: argparse.Namespace, arguments: list[str]) -> None:
    """Start workers until every case has a row or the time is up; a dead worker's case becomes an error row."""
    from gpu_rows import failed

    deadline = time.time() + 60 * args.minutes
    rows_file, current = args.out / "rows.jsonl", args.out / "current"
    cases = {case.name: case for case in chosen(args)}
    while time.time() < deadline and cases.keys() - {row["case"] for row in read_rows(rows_file)}:
        current.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, f"--worker={deadline}"]
        worker = subprocess.Popen(command)
        started, reason = time.time(), None
        while worker.poll() is None:
            time.sleep(0.2)
            since = max(started, current.stat().st_mtime if current.exists() else 0)
            if time.time() - since > _ROW_SECONDS or time.time() > deadline + _GRACE:
                reason = f"stopped after {time.time() - since:.0f} s"
                worker.kill()
                worker.wait()
        name = current.read_text() if current.exists() else ""
        if worker.returncode == 0:
            break
        if not name:
            print("the worker does not start; see the message above", file=sys.stderr)
            break
        if worker.returncode != _STUCK or name not in {row["case"] for row in read_rows(rows_file)}:
            reason = reason or f"the worker died with status {worker.returncode}"
            _append(rows_file, failed(cases[name], "all", reason))
    current.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.check:
        problem = missing(args.check) or (no_gpu() if args.device == "cuda" else None)
        print(problem or f"all that gpu-{args.check} needs is here")
        return 1 if problem else 0
    if problem := missing("bench") or (no_gpu() if args.device == "cuda" else None):
        print(problem, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker is not None:
        return work(args)
    supervise(args, arguments)
    rows = read_rows(args.out / "rows.jsonl")
    text = table(rows)
    (args.out / "gpu.md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {args.out}/rows.jsonl and {args.out}/gpu.md")
    return 0 if any(not row["failed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
