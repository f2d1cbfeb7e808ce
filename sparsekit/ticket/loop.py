"""Iterative magnitude pruning as an iterator over rounds, for anyone's training loop."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..mask import Masks, density
from ..nn import convert, dense_state, masks_of
from ..pattern import Pattern
from ..plan import explain
from ..prune import CRITERIA, prunable, prune_step
from .ledger import masked_dense_us, summarize
from .rewind import Rewind, Snapshot, get_rng, set_rng
from .store import RunDir

__all__ = ["Round", "TicketSearch", "tickets"]


class Round:
    """One round of a search: train ``model``; everything else is optional.

    Attributes: ``number`` (0 is the dense round), ``model`` (already sparse where that is faster),
    ``masks``, ``density`` (share of prunable weights that survive), ``rewind``.
    """

    def __init__(self, number: int, model: nn.Module, masks: Masks, rewind: Rewind, search: TicketSearch) -> None:
        self.number, self.model, self.masks, self.rewind = number, model, masks, rewind
        self.density = search.density(masks)
        self.metrics: dict[str, Any] = {}
        self.steps = 0
        self._search = search
        self._optimizer = self._scheduler = None
        self._point: int | None = None

    def begin(self, optimizer=None, scheduler=None, steps_per_epoch: int | None = None) -> int:
        """Announce the optimizer (and scheduler); returns the step to train from.

        Needed for rewinding to a step, where round 0 must be watched and later rounds get optimizer,
        scheduler and generator states of that step back; also carries the last learning rate on with
        ``rewind="none"``. Call :meth:`step` after every iteration.
        """
        self._optimizer, self._scheduler = optimizer, scheduler
        search = self._search
        if self.rewind.kind == "weights":
            self._point = self.rewind.step(steps_per_epoch)
            if self.number and search.point is not None:
                search.point.restore_optimizer(self.model, optimizer, scheduler)
                set_rng(search.point.rng)
                self.steps = search.point.step
        elif self.rewind.kind == "none" and self.number and search.end.get("groups") is not None:
            for group, rates in zip(optimizer.param_groups, search.end["groups"], strict=True):
                group.update(rates)
            if scheduler is not None and search.end.get("scheduler") is not None:
                scheduler.load_state_dict(search.end["scheduler"])
        return self.steps

    def step(self) -> None:
        """Count one finished iteration (after the optimizer's and the scheduler's step)."""
        self.steps += 1
        if self.number == 0 and self._point and self.steps == self._point:
            self._search.keep_point(Snapshot.take(self.steps, self.model, self._optimizer, self._scheduler))

    def record(self, **metrics: Any) -> None:
        """Add to the ledger's line: ``test_accuracy``, ``val_loss``, ``early_stop_iteration``, or any JSON value.

        ``train_seconds`` and ``masked_dense_seconds`` replace what the search measures by itself.
        """
        self.metrics.update(metrics)

    def variant(self, fresh: nn.Module) -> nn.Module:
        """``fresh``, a dense model of the same architecture, under this round's masks: for control runs."""
        return self._search.convert(fresh, self.masks)

    def permutation(self, count: int, epoch: int) -> Tensor:
        """A data order that depends on the epoch alone: the same in every round and after a resume."""
        generator = torch.Generator().manual_seed(self._search.order_seed + epoch)
        return torch.randperm(count, generator=generator)

    def end(self) -> dict[str, Any]:
        """What the next round needs of this one's end."""
        groups = None
        if self._optimizer is not None:
            groups = [
                {k: v for k, v in group.items() if k in ("lr", "initial_lr")} for group in self._optimizer.param_groups
            ]
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {"rng": get_rng(), "groups": groups, "scheduler": scheduler}


class TicketSearch:
    """The iterable that :func:`tickets` returns; ``summary`` holds the ledger as it grows."""

    def __init__(self, model, rounds, rate, pattern, criterion, scope, rewind, run_dir, exclude, example_inputs, impl, note):
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
            raise ValueError(f"Expected rounds as a whole number of pruning rounds, got {rounds!r}")
        self.rewind, self.pattern = Rewind.parse(rewind), Pattern.parse(pattern)
        if self.pattern.nm and rounds > 1:
            raise ValueError(f"Expected rounds=1 with pattern {pattern!r}, which fixes the sparsity, got {rounds}")
        if not callable(criterion) and criterion not in CRITERIA:
            raise ValueError(f"Expected a criterion of {', '.join(CRITERIA)} or a function, got {criterion!r}")
        self._model, self._rounds = model, rounds
        self._names = list(prunable(model, exclude))
        self._how = {"rate": rate, "pattern": self.pattern, "criterion": criterion, "scope": scope, "exclude": exclude}
        self._total = {
            name: torch.Size(_shape(module)).numel() for name, module in prunable(model, exclude).items()
        }
        prune_step(model, {}, **self._how)  # bad arguments fail here, before anything is trained or written
        self._example_inputs, self._impl = example_inputs, impl
        self._note = dict(note or {})
        self._run_dir = run_dir
        self.point: Snapshot | None = None
        self.end: dict[str, Any] = {}
        self.order_seed = 0
        self.summary: dict[str, Any] = {}

    @property
    def config(self) -> dict[str, Any]:
        """What was asked for, JSON-ready."""
        how = self._how
        criterion = how["criterion"] if isinstance(how["criterion"], str) else how["criterion"].__name__
        shapes = {name: list(tensor.shape) for name, tensor in self._model.state_dict().items()}
        return {
            "rounds": self._rounds,
            "rate": how["rate"] if isinstance(how["rate"], int | float) else dict(how["rate"]),
            "pattern": str(self.pattern),
            "criterion": criterion,
            "scope": how["scope"],
            "rewind": "init" if self.rewind == Rewind("weights") else _text(self.rewind),
            "exclude": [how["exclude"]] if isinstance(how["exclude"], str) else list(how["exclude"]),
            "impl": self._impl,
            "parameters": shapes,
            **self._note,
        }

    def density(self, masks: Mapping[str, Tensor]) -> float:
        """Share of all prunable weights that ``masks`` leave alive."""
        dead = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
        return 1 - dead / max(1, sum(self._total.values()))

    def convert(self, model: nn.Module, masks: Masks) -> nn.Module:
        """A dense model with ``masks`` as this search trains it."""
        return convert(model, masks, self._example_inputs, training=True, impl=self._impl, inplace=True)

    def keep_point(self, snapshot: Snapshot) -> None:
        """Keep the snapshot that later rounds rewind to."""
        self.point = snapshot
        self._run.keep_snapshot("rewind", snapshot)

    def __iter__(self) -> Iterator[Round]:
        self._run = run = RunDir(self._run_dir, self.config)
        start = run.snapshot("start")
        if start is None:
            start = Snapshot.take(0, self._model)
            run.keep_snapshot("start", start)
        self._check_start(start)
        late = self.rewind.kind == "weights" and self.rewind.count > 0
        self.point = run.snapshot("rewind") if late else start
        self.order_seed = int(hashlib.sha256(start.rng["torch"].numpy().tobytes()).hexdigest()[:12], 16)
        results: list[dict] = []
        for number in range(self._rounds + 1):
            result = run.result(number)
            if result is None or (number == 0 and late and self.point is None):
                clock = time.perf_counter()
                round_ = self._open_round(number, start)
                opened = time.perf_counter()
                yield round_
                closed = time.perf_counter()
                result = self._close_round(round_, opened - clock, closed - opened)
            results.append(result)
            self.summary = summarize(self.config, results)
            run.keep_summary(self.summary)

    def _check_start(self, start: Snapshot) -> None:
        shapes = {name: list(tensor.shape) for name, tensor in start.model.items()}
        if shapes != self.config["parameters"]:
            raise ValueError(f"{self._run_dir}: Expected a start of this model's shapes, got another model's")

    def _open_round(self, number: int, start: Snapshot) -> Round:
        model = copy.deepcopy(self._model)
        if number == 0:
            model.load_state_dict(start.model)
            set_rng(start.rng)
            return Round(0, model, {}, self.rewind, self)
        trained, masks, self.end = self._run.load_round(number - 1)
        model.load_state_dict(trained)
        set_rng(self.end["rng"])  # a random criterion draws the same after a resume
        masks = prune_step(model, masks, **self._how)
        if self.rewind.kind == "weights":
            if self.point is None:
                raise ValueError(
                    f"Expected round.begin(optimizer) and round.step() in round 0 to reach the rewind point "
                    f"{_text(self.rewind)}, got no snapshot"
                )
            model.load_state_dict(self.point.model)
        model = self.convert(model, masks)
        set_rng(self.end["rng"] if self.rewind.kind == "none" else (self.point or start).rng)
        return Round(number, model, masks, self.rewind, self)

    def _close_round(self, round_: Round, open_seconds: float, seconds: float) -> dict:
        masks = masks_of(round_.model)
        if round_.number == 0:
            masks = {}
        end = round_.end()
        state = dense_state(round_.model)
        result = {
            "round": round_.number,
            "density": round_.density,
            "test_accuracy": None,
            "val_loss": None,
            "early_stop_iteration": None,
            "train_seconds": seconds,
            "masked_dense_seconds": None,
            "steps": round_.steps,
        } | round_.metrics
        result["overhead_seconds"] = open_seconds + max(0.0, seconds - result["train_seconds"])
        if result["masked_dense_seconds"] is None and self._example_inputs is not None and round_.steps:
            ours, masked = masked_dense_us(round_.model, masks, self._example_inputs)
            result["masked_dense_seconds"] = result["train_seconds"] + (masked - ours) * round_.steps / 1e6
        masked = result["masked_dense_seconds"]
        result["speedup"] = masked / result["train_seconds"] if masked else None
        result["layers"] = [
            {"name": layer.name, "shape": list(layer.shape), "density": layer.density, "format": layer.chosen}
            for layer in explain(round_.model).layers
        ]
        self._run.finish_round(round_.number, state, masks, end, result)
        return result


def tickets(
    model: nn.Module,
    rounds: int = 12,
    rate: float | Mapping[str, float] = 0.2,
    pattern: str = "unstructured",
    criterion: str | Callable = "magnitude",
    scope: str = "layer",
    rewind: str = "init",
    run_dir: str | Path | None = None,
    *,
    exclude: Iterable[str] = (),
    example_inputs: Any = None,
    impl: str = "auto",
    note: Mapping[str, Any] | None = None,
) -> TicketSearch:
    """Search for a winning ticket: ``for round in tickets(model): train(round.model)``.

    Round 0 trains the dense network; each of the ``rounds`` that follow removes the share ``rate`` of
    what is left, rewinds the rest and yields the sparse model, so ``rounds + 1`` trainings in all
    (one-shot pruning is ``rounds=1``). ``model`` itself is never changed.

    Args:
        rate, pattern, criterion, scope, exclude: as in :func:`sparsekit.prune`, ``rate`` being a share
            of the survivors; per layer as a dict (``{"*": 0.2, "fc3": 0.1}``, last match wins).
        rewind: ``"init"``; a step ``"500it"`` or ``"2ep"`` (see :meth:`Round.begin`); ``"lr"`` keeps
            the trained weights and replays the schedule; ``"none"`` fine-tunes on.
        run_dir: where every finished round leaves its files; relaunched with the same arguments, the
            search goes on after the last finished round and ends bit-equal to an uninterrupted one
            (on the CPU with as many threads, when training draws from torch's, numpy's or Python's
            global generators or from :meth:`Round.permutation`).
        example_inputs: as in :func:`sparsekit.convert`; also lets the ledger measure masked-dense steps.
        note: JSON values kept in the run's configuration (data set, seed, …) and compared on relaunch.

    Raises: ValueError on bad arguments, or a run directory of another configuration, before training.
    """
    return TicketSearch(
        model, rounds, rate, pattern, criterion, scope, rewind, run_dir, exclude, example_inputs, impl, note
    )


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(getattr(module, "weight_orig", module.weight).shape)


def _text(rewind: Rewind) -> str:
    return rewind.kind if rewind.kind != "weights" else f"{rewind.count}{rewind.unit}"
