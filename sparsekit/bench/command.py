"""``sparsekit bench``: options, and what is done with them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .cases import LEVELS, SUITES, select
from .runner import run, table

__all__ = ["add_options", "execute"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of the command."""
    parser.add_argument("suite", nargs="?", default="hero", help=f"{', '.join(SUITES)}, tickets or all (default: hero)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="so many CPU threads, pinned (default: torch's, not pinned)")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="few cases, short")
    level.add_argument("--full", action="store_true", help="all cases and rivals, long")
    parser.add_argument("--filter", default="", metavar="WORDS", help="only cases whose names contain every word")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and the rivals, time nothing")
    parser.add_argument(
        "--json", type=Path, metavar="OUT",
        help="also write the rows to this file, or to OUT/<device>/<date>-<commit>.json; a stopped run goes on there",
    )  # fmt: skip
    parser.add_argument("--graphs", action="store_true", help="on a GPU: time replays of CUDA graphs, not launches")
    parser.add_argument("--again", action="store_true", help="measure anew what the file has already")
    parser.add_argument(
        "--base", metavar="REF", help="run the same at another commit too, and compare: exit code 1 if worse"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two files; exit code 1 if B is worse"
    )
    parser.add_argument(
        "--page", nargs="+", type=Path, metavar=("OUT.html", "FILE"), help="show files in one HTML page"
    )


def execute(args: argparse.Namespace) -> int:
    """Do it; returns the exit code. Raises ValueError or FileNotFoundError on options and files that are none."""
    level = "quick" if args.quick else "full" if args.full else "usual"
    if args.compare:
        from .compare import compare, render
        from .results import read

        changes, alone = compare(*map(read, args.compare))
        if not changes:
            raise ValueError(
                f"{args.compare[1]}: Expected cases of {args.compare[0]} (suite, name and threads), got none of them"
            )
        print(render(changes, alone))
        return int(any(change.verdict == "worse" for change in changes))
    if args.page:
        from .page import write_page

        if len(args.page) < 2 or args.page[0].suffix != ".html":
            raise ValueError(f"Expected --page OUT.html FILE…, got {' '.join(map(str, args.page))}")
        print(write_page(args.page[1:], args.page[0]))
        return 0
    if args.suite == "tickets":
        from .tickets import run as search

        search(level, args.threads, args.json)
        return 0
    if args.list:
        _list(args.suite, level, args.filter, args.device)
        return 0
    if args.base:
        return _base(args, level)
    try:
        rows = run(args.suite, where=args.device, threads=args.threads, level=level, filter=args.filter, out=args.json,
                   again=args.again, graphs=args.graphs, say=lambda text: print(text, flush=True))  # fmt: skip
    except RuntimeError as error:  # wrong results: the rows that are right were printed
        print(f"sparsekit bench: {error}", file=sys.stderr)
        return 1
    for suite in dict.fromkeys(row.suite for row in rows):
        print(f"\n{suite}\n{table([row for row in rows if row.suite == suite])}")
    return 0


def _list(suite: str, level: str, words: str, where: str) -> None:
    from .rivals import RIVALS, absences

    for case in select(suite, level, words, where):
        print(f"{case.suite}/{case.name}")
    missing = absences(where)
    for rival in RIVALS:
        when = missing.get(rival.name) or ("" if rival.level == "quick" else f"from {rival.level} on")
        print(f"rival {rival.name}: {rival.how}" + (f" ({when})" if when else ""))


def _base(args: argparse.Namespace, level: str) -> int:
    from .compare import against, render

    words = [args.suite, "--device", args.device, *(["--filter", args.filter] if args.filter else [])]
    words += ["--threads", str(args.threads)] if args.threads else []
    words += [f"--{level}"] if level != LEVELS[1] else []
    words += ["--graphs"] if args.graphs else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "now.json"
        run(args.suite, where=args.device, threads=args.threads, level=level, filter=args.filter, out=out,
            graphs=args.graphs)  # fmt: skip
        changes, alone = against(args.base, words, out)
    print(f"\n{args.base} -> now\n{render(changes, alone)}")
    return int(any(change.verdict == "worse" for change in changes))
