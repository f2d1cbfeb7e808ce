"""What the recipes search: one run directory a seed, and what is read off the summaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from .. import data as datasets
from .. import models
from ..data import Dataset
from ..report import write_report
from ..ticket.loop import tickets
from ..ticket.replicates import train_round_together
from ..ticket.train import Training, train_round
from .base import Setting
from .figure import Curve, Panel, draw, over_seeds

__all__ = ["at", "figure", "gaps", "scaled", "search", "sooner"]


def search(
    setting: Setting, model: str, data: str, rounds: int, training: Training, seeds: int, controls: Sequence[str] = (),
    rewind: str = "init", criterion: str = "magnitude", together: bool = False, every: float = 1, below: float = 1.0,
    load: Callable[[int], Dataset] | None = None, start: Callable[[nn.Module, int], None] | None = None,
) -> list[dict]:  # fmt: skip
    """Summaries of one search per seed, each with its run directory and report in ``setting.out``.

    A round removes what ``every`` rounds of the paper's remove; controls are trained from density ``below`` down.
    ``load(seed)`` gives other data than the named ones, ``start(model, seed)`` other first weights.
    """
    summaries = []
    for seed in range(seeds):
        loaded = datasets.load(data, setting.data_dir, seed=seed) if load is None else load(seed)
        loaded = loaded.to(setting.device)
        shape = tuple(loaded.train_x.shape[1:])

        def build(seed: int, loaded=loaded, shape=shape):
            return models.build(model, classes=loaded.classes, input_shape=shape, seed=seed).to(setting.device)

        torch.manual_seed(seed)
        recipe_of, network = models.recipe(model), build(seed)
        if start is not None:
            start(network, seed)
        rates = {name: rate if every == 1 else 1 - (1 - rate) ** every for name, rate in models.rates(model).items()}
        spared = [name for name, rate in rates.items() if rate == 0]
        run = tickets(
            network, rounds, rates["*"] if recipe_of.scope == "global" else rates, scope=recipe_of.scope,
            criterion=criterion, rewind=rewind, run_dir=setting.out / f"seed_{seed}", exclude=spared,
            example_inputs=loaded.train_x[: training.batch_size],
            impl="csr" if together or setting.scale == "smoke" else "auto",
            note={"model": model, "data": data, "note": loaded.note, "seed": seed, "training": str(training)}
            | ({} if start is None else {"start": start.__name__}),
        )  # fmt: skip
        step: Callable = train_round_together if together else train_round
        for round_ in run:
            beside = controls if round_.density <= below else ()
            step(round_, loaded, training, controls=beside, fresh=build, seed=seed)
            print(f"seed {seed}: round {round_.number} of {rounds}, {100 * round_.density:.1f} % left", flush=True)
        summaries.append(run.summary)
        if setting.scale != "smoke":
            write_report(setting.out / f"seed_{seed}")
    return summaries


def scaled(model: str, iterations: int) -> Training:
    """The recipe's training at another length: schedules shrink with it."""
    own = models.recipe(model)

    def shrunk(step: int) -> int:
        return step * iterations // own.iterations

    return Training(
        iterations, own.batch_size, own.optimizer, own.lr, own.momentum, own.weight_decay,
        min(own.eval_every, iterations), shrunk(own.warmup), tuple(map(shrunk, own.milestones)),
    )  # fmt: skip


def at(rows: list[dict], density: float) -> dict:
    """The round whose density is nearest."""
    return min(rows, key=lambda row: abs(row["density"] - density))


def gaps(summaries: list[dict], density: float, control: str | None = None) -> list[float]:
    """Ticket less dense (or less a control) in accuracy at early stop, one per seed."""
    found = []
    for summary in summaries:
        row = at(summary["rounds"][1:], density)
        other = summary["rounds"][0] if control is None else row["controls"][control]
        found.append(row["test_accuracy"] - other["test_accuracy"])
    return found


def sooner(summaries: list[dict], density: float) -> list[float]:
    """How much earlier than the dense network the ticket stops, as a share of the dense network's iterations."""
    rows = [(at(s["rounds"][1:], density), s["rounds"][0]) for s in summaries]
    return [1 - row["early_stop_iteration"] / dense["early_stop_iteration"] for row, dense in rows]


def figure(setting: Setting, title: str, found: list[dict], paper: Mapping[str, list[tuple[float, float]]]) -> None:
    """Accuracy less dense and early stop over dense, against weights remaining, with the ``paper``'s points
    ``{"accuracy": [(percent, points)], "stop": [(percent, share)]}``."""
    rounds = [summary["rounds"] for summary in found]

    def curve(kind: str, of: Callable[[dict, dict], float]) -> Curve:
        """``kind`` is a control, or ``"ticket"``."""
        lines = rounds
        if kind != "ticket":
            lines = [[(row.get("controls") or {}).get(kind) for row in rows] for rows in rounds]
        there = [n for n, line in enumerate(lines[0]) if n and line]
        runs = [[of(line[n], rows[0]) for n in there] for line, rows in zip(lines, rounds, strict=True)]
        return over_seeds(kind, [100 * rounds[0][n]["density"] for n in there], runs)

    kinds = ["ticket", *dict.fromkeys(name for row in rounds[0] for name in row.get("controls") or ())]

    def panel(label: str, key: str, level: float, of: Callable[[dict, dict], float]) -> Panel:
        points = [Curve("ticket, paper", [x for x, _ in paper[key]], [y for _, y in paper[key]], paper=True)]
        return Panel("", label, [curve(kind, of) for kind in kinds] + points, densities=True, level=level)

    def gap(row: dict, dense: dict) -> float:
        return 100 * (row["test_accuracy"] - dense["test_accuracy"])

    def stop(row: dict, dense: dict) -> float:
        return row["early_stop_iteration"] / max(1, dense["early_stop_iteration"])

    panels = [panel("accuracy less dense (points)", "accuracy", 0, gap), panel("early stop / dense", "stop", 1, stop)]
    draw(setting.out, title, panels)
