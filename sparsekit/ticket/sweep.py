"""Sweeps: one search over seeds and over choices of criterion, pattern and rewind, gathered into one summary.

::

    OUT/seed_0 …                   one choice, several seeds
    OUT/study.json                 the verdicts over the seeds
    OUT/snip_block-8x1/seed_0 …    several choices
    OUT/sweep.json, OUT/sweep.md   the verdicts of all, and nothing that the clock decides
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from .. import words
from ..criteria import find
from ..files import write_json
from ..pattern import Pattern
from . import ranks
from .rewind import Rewind
from .round import plain
from .verdict import study, verdict_rows, verdict_table

__all__ = ["AXES", "gather", "variants"]

AXES = ("criterion", "pattern", "rewind")


def variants(args: Namespace) -> dict[str, Namespace]:
    """The searches that ``args`` asks for, by name; one, without a name, where no option lists several choices.

    Raises: ValueError on a choice that there is not, or that is listed twice.
    """
    choices = {axis: getattr(args, axis).split(",") for axis in AXES}
    for axis, listed in choices.items():
        if len(set(listed)) < len(listed):
            raise ValueError(f"Expected each --{axis} once, got {','.join(listed)}")
    for criterion in choices["criterion"]:  # here, and not after hours of the searches before it
        find(criterion)
    for pattern in choices["pattern"]:
        Pattern.parse(pattern)
    for rewind in choices["rewind"]:
        Rewind.parse("init" if rewind == "auto" else rewind)
    several = [axis for axis in AXES if len(choices[axis]) > 1]
    found = {}
    for chosen in product(*choices.values()):
        own = dict(zip(AXES, chosen, strict=True))
        name = "_".join(own[axis].replace(":", "-") for axis in several)
        found[name] = Namespace(**vars(args) | own)
    return found


def gather(out: Path, found: Mapping[str, tuple[Sequence[int], Sequence[dict]]], judged: bool) -> dict[str, Any]:
    """Judge the ``(seeds, summaries)`` of each search, print the verdicts and write what OUT holds above the runs.

    Returns the one summary, the study over seeds, or the sweep of several searches.
    """
    studies = {}
    for name, (seeds, summaries) in found.items():
        result = {"seeds": list(seeds), "config": summaries[0]["config"]}
        if judged:
            rounds = study(summaries)
            print("\n".join([*([f"{name}:"] if name else []), verdict_table(rounds)]))
            result["rounds"] = plain("study", rounds)
            if len(seeds) > 1 and ranks.rank() == 0:
                write_json(out / name / "study.json", result)
        studies[name] = result
    if "" in found:
        return studies[""] if len(found[""][0]) > 1 else found[""][1][0]
    sweep = {"searches": studies}
    if ranks.rank() == 0:
        write_json(out / "sweep.json", sweep)
        (out / "sweep.md").write_text(_markdown(studies, found), encoding="utf-8")
    return sweep


def _markdown(studies: Mapping[str, dict], found: Mapping[str, tuple[Sequence[int], Sequence[dict]]]) -> str:
    lines = ["# Sweep", ""]
    for name, result in studies.items():
        seeds = ", ".join(map(str, result["seeds"]))
        lines += [f"## {words.cell(name)}", "", f"Seeds: {seeds}. Folder: {words.cell(name)}.", ""]
        if "rounds" in result:
            head, *rows = verdict_rows(study(found[name][1]))
        else:
            head = ["weights %", "accuracy %"]
            rounds = found[name][1][0]["rounds"]
            rows = [[words.weights(row), words.accuracy(row.get("test_accuracy"))] for row in rounds]
        lines += [_row(head), "|" + "--:|" * len(head), *map(_row, rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(words.cell, cells)) + " |"
