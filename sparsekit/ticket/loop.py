"""Iterative magnitude pruning as an iterator over rounds, for anyone's training loop."""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import format as formats
from ..criteria import batches_of, find, name_of
from ..flops import flop_density, positions
from ..mask import Masks, weight_of
from ..nn import convert, dense_state, masks_of
from ..nn.convert import reject_tied
from ..pattern import Pattern
from ..plan import explain
from ..prune import check_counts, prunable, prune_step
from ..schedule import check_rates
from . import ranks
from .ledger import masked_dense_us, summarize
from .refilled import check_refill, refilled
from .rewind import Rewind, Snapshot, get_rng, set_rng
from .round import Round, formats_of, shapes
from .store import RunDir

__all__ = ["TicketSearch", "tickets"]


class TicketSearch:
    """The iterable that :func:`tickets` returns; ``summary`` holds the ledger as it grows."""

    def __init__(
        self, model, rounds, rate, pattern, criterion, scope, rewind, run_dir, exclude, example_inputs, impl, note,
        score_at, refill, facts,
    ):  # fmt: skip
        if rounds is None:
            rounds = len(rate) if isinstance(rate, list | tuple) else 12
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
            raise ValueError(f"Expected rounds as a whole number of pruning rounds, got {rounds!r}")
        self.rewind, self.pattern = Rewind.parse(rewind), Pattern.parse(pattern)
        if self.pattern.nm and rounds > 1:
            raise ValueError(f"Expected rounds=1 with pattern {pattern!r}, which fixes the sparsity, got {rounds}")
        if score_at not in ("end", "init"):
            raise ValueError(f"Expected score_at 'end' or 'init', got {score_at!r}")
        self.refill = check_refill(refill, self.pattern, rounds)
        find(criterion)
        if impl != "auto":
            formats.get(impl)
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        layers = prunable(model, exclude)
        if not layers:
            raise ValueError(f"Expected a model with a linear or convolution layer, got {type(model).__name__}")
        for name, module in layers.items():
            if hasattr(module, "survivors") or hasattr(module, "weight_orig"):
                raise ValueError(f"{name}: Expected a dense weight, got a pruned one; sparsekit.to_dense gives it back")
        self.model, self._rounds = model, rounds
        self._rates, self._score_at = check_rates(rate, rounds), score_at
        self._how = {"pattern": self.pattern, "criterion": criterion, "scope": scope, "exclude": exclude}
        if facts["data"] is not None:
            facts["data"] = batches_of(facts["data"])  # once: an iterator would be empty in the second round
        self._how |= facts
        everything = {name: torch.ones(weight_of(m).shape, dtype=torch.bool) for name, m in layers.items()}
        self._everything = everything
        self._total = sum(mask.numel() for mask in everything.values())
        self._positions: dict[str, int] = {}
        check_counts(facts["steps"], facts["least"])
        self._example_inputs, self._impl = example_inputs, impl
        self._rehearse()
        self._run_dir = run_dir
        self.config = self._configuration(rate, note or {})
        self.start: Snapshot | None = None
        self.point: Snapshot | None = None
        self.end: dict[str, Any] = {}
        self.order: dict[str, tuple[Tensor, ...]] = {}
        self.order_seed = 0
        self.summary: dict[str, Any] = {}

    def _rehearse(self) -> None:
        """Bad arguments fail here, before anything is trained or written."""
        rng = get_rng()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for rate in {repr(rate): rate for rate in self._rates or [0.0]}.values():
                masks = prune_step(self.model, {}, rate, **self._how | {"init": self.model.state_dict(), "steps": 1})
                reject_tied(self.model, {name: mask for name, mask in masks.items() if not bool(mask.all())})
        set_rng(rng)
        if self._example_inputs is not None:
            try:
                self._positions = positions(self.model, self._example_inputs)
            except Exception as error:  # whatever its layers raise
                got = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ValueError(f"Expected example_inputs that the model takes, got: {got}") from error

    def _configuration(self, rate: Any, note: Mapping[str, Any]) -> dict[str, Any]:
        """What was asked for, JSON-ready."""
        how = self._how
        config = {
            "rounds": self._rounds,
            "rate": dict(rate) if isinstance(rate, Mapping) else rate,
            "pattern": str(self.pattern),
            "criterion": name_of(how["criterion"]),
            "scope": how["scope"],
            "rewind": str(self.rewind),
            "exclude": list(how["exclude"]),
            "impl": self._impl,
            "parameters": shapes(self.model.state_dict()),
        }
        # What is not asked for is not written, so that runs that began before it could be go on.
        config |= {key: how[key] for key in ("steps", "least") if how[key]}
        config |= {"score_at": self._score_at} if self._score_at != "end" else {}
        config |= {"refill": f"{self.refill} after round {self._rounds}"} if self.refill else {}
        if taken := config.keys() & note.keys():
            raise ValueError(f"Expected a note without the search's own names, got {sorted(taken)}")
        try:
            return json.loads(json.dumps(config | dict(note)))
        except TypeError as error:
            raise TypeError(f"Expected a note of JSON values, got {error}") from None

    def density(self, masks: Mapping[str, Tensor]) -> float:
        """Share of all prunable weights that ``masks`` leave alive."""
        dead = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
        return 1 - dead / max(1, self._total)

    def flop_density(self, masks: Mapping[str, Tensor]) -> float | None:
        """Share of the multiply-adds of all prunable layers that ``masks`` leave; None without example inputs."""
        if self._example_inputs is None:
            return None
        return flop_density({name: masks.get(name, mask) for name, mask in self._everything.items()}, self._positions)

    def convert(self, model: nn.Module, masks: Masks, formats: Mapping[str, str]) -> nn.Module:
        """A dense model with ``masks`` as this search trains it, in place; ``formats`` are of an earlier conversion."""

        def converted(model: nn.Module, impl: Any) -> nn.Module:
            return convert(model, masks, self._example_inputs, training=True, impl=impl, inplace=True)

        if ranks.count() > 1 and not formats:  # which the clock chooses, and rank 0's for all
            formats = ranks.from_first(lambda: formats_of(converted(copy.deepcopy(model), self._impl)))
        return converted(model, formats or self._impl)

    def keep_point(self, snapshot: Snapshot) -> None:
        """Keep the snapshot that later rounds rewind to."""
        self.point = snapshot
        self._run.keep_snapshot("rewind", snapshot)

    def _open_run(self) -> Any:
        if ranks.count() == 1:
            return RunDir(self._run_dir, self.config)
        return ranks.SharedRun(lambda: RunDir(self._run_dir, self.config))

    def __iter__(self) -> Iterator[Round]:
        self._run = run = self._open_run()
        start = run.snapshot("start")
        if start is None:
            start = ranks.from_first(lambda: Snapshot.take(0, self.model))
            run.keep_snapshot("start", start)
        self._check_start(start)
        self.start = start
        late = self.rewind.kind == "weights" and self.rewind.count > 0
        self.point = run.snapshot("rewind") if late else start
        self.pattern, self.order = self._how["pattern"], {}
        self.order_seed = int(hashlib.sha256(start.rng["torch"].numpy().tobytes()).hexdigest()[:12], 16)
        results: list[dict] = []
        last = self._rounds + bool(self.refill)
        for number in range(last + 1):
            result, fresh = run.result(number), False
            if result is None or (number == 0 and late and self.point is None):
                clock = time.perf_counter()
                round_ = self._open_round(number, start)
                opened = time.perf_counter()
                yield round_
                closed = time.perf_counter()
                result = self._close_round(round_, opened - clock, closed - opened)
                fresh = True
            results.append(result)
            self.summary = summarize(self.config, results)
            if fresh or number == last:
                run.keep_summary(self.summary)

    def _check_start(self, start: Snapshot) -> None:
        if shapes(start.model) != self.config["parameters"]:
            raise ValueError(f"{self._run_dir}: Expected a start of this model's shapes, got another model's")

    def _open_round(self, number: int, start: Snapshot) -> Round:
        model = copy.deepcopy(self.model)
        if number == 0:
            model.load_state_dict(start.model)
            set_rng(start.rng)
            return Round(0, model, {}, self.rewind, self)
        trained, before, self.end = self._run.load_last(number - 1)
        model.load_state_dict(trained)
        set_rng(self.end["rng"])  # a random criterion draws the same after a resume
        facts: dict[str, Any] = {}
        if number > self._rounds:
            done = refilled(model, before, self.refill, self.point or start, self._example_inputs)
            model, masks, self.point, self.order, facts["refill"] = done
            self.pattern = self.refill
        else:
            if self._score_at == "init":
                model.load_state_dict(start.model)
            where = next(model.parameters()).device
            masks = ranks.masks_from_first(
                lambda: prune_step(model, before, self._rates[number - 1], **self._how, init=start.model), where
            )
            if self._score_at == "init":
                model.load_state_dict(trained)
        if self.rewind.kind == "weights":
            model.load_state_dict(self.point.model)
        # Formats round differently and are chosen by the clock: a round that was begun keeps those it had.
        model = self.convert(model, masks, self._run.formats(number))
        self._run.keep_formats(number, formats_of(model))
        ranks.agree(masks_of(model))
        set_rng(self.end["rng"] if self.rewind.kind == "none" else self.point.rng)
        round_ = Round(number, model, masks, self.rewind, self)
        round_.record(**facts)
        return round_

    def _close_round(self, round_: Round, open_seconds: float, seconds: float) -> dict:
        round_.check_end()
        end, state, masks = round_.end(), dense_state(round_.model), masks_of(round_.model)
        end |= {"order": self.order} if self.order else {}
        digest = ranks.agree(masks)
        steps, given = round_.steps - round_._first, round_.metrics
        control = given.get("control_seconds") or 0.0
        result = {
            "round": round_.number,
            "density": round_.density,
            "flop_density": self.flop_density(masks),
            "masks_sha256": digest,
            "test_accuracy": None,
            "val_loss": None,
            "early_stop_iteration": None,
            "train_seconds": seconds - control,
            "masked_dense_seconds": None,
            "speedup": None,
            "steps": steps,
        } | given
        train = result["train_seconds"]
        # timing masked-dense steps is no cost of the search, nor are other searches that trained with it
        foreign = sum(result.get(key) or 0.0 for key in ("sample_seconds", "others_seconds"))
        result["overhead_seconds"] = open_seconds + max(0.0, seconds - train - control - foreign)
        alone = ranks.count() == 1  # several wait for each other, which a sample on one does not tell
        if result["masked_dense_seconds"] is None and self._example_inputs is not None and steps and alone:
            ours, masked = masked_dense_us(round_.model, masks, self._example_inputs)
            result["masked_dense_seconds"] = train + (masked - ours) * steps / 1e6
        if train and result["masked_dense_seconds"]:
            result["speedup"] = result["masked_dense_seconds"] / train
        result["layers"] = [
            {"name": layer.name, "shape": list(layer.shape), "density": layer.density, "format": layer.chosen}
            for layer in explain(round_.model).layers
        ]
        self._run.finish_round(round_.number, state, masks, end, result)
        return ranks.from_first(lambda: result)


def tickets(
    model: nn.Module,
    rounds: int | None = None,
    rate: float | Mapping[str, float] | Sequence = 0.2,
    pattern: str = "unstructured",
    criterion: str | Callable = "magnitude",
    scope: str | Sequence = "layer",
    rewind: str = "init",
    run_dir: str | Path | None = None,
    *,
    exclude: Iterable[str] = (),
    example_inputs: Any = None,
    impl: str = "auto",
    note: Mapping[str, Any] | None = None,
    score_at: str = "end",
    refill: str | None = None,
    steps: int | None = None,
    least: int = 0,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> TicketSearch:
    """Search for a winning ticket: ``for round in tickets(model): train(round.model)``.

    Round 0 trains the dense network; each of the ``rounds`` that follow removes the share ``rate`` of
    what is left, rewinds the rest and yields the sparse model, so ``rounds + 1`` trainings in all
    (one-shot pruning is ``rounds=1``). ``model`` itself is never changed. A round is finished, and kept,
    when the loop asks for the next one; ``break`` or an exception gives the round up. In a default process
    group of several ranks all take part: masks and formats are rank 0's, checked by their hash before and after
    every round, rank 0 alone writes to ``run_dir``, and wrapping ``round.model`` (DDP) is the loop's business.

    Args:
        rounds: pruning rounds after the dense one; None takes as many as ``rate`` has entries, or 12.
        rate, pattern, criterion, scope, exclude: as in :func:`sparsekit.prune`, ``rate`` being a share
            of the survivors; per layer as a dict (``{"*": 0.2, "fc3": 0.1}``, last match wins), per round as
            a list, which :func:`sparsekit.schedule` makes.
        rewind: ``"init"``; a step ``"500it"`` or ``"2ep"`` (see :meth:`Round.begin`); ``"lr"`` keeps
            the trained weights and replays the schedule; ``"none"`` fine-tunes on.
        run_dir: where every finished round leaves its files; relaunched with the same arguments, the
            search goes on after the last finished round and ends bit-equal to an uninterrupted one
            (on the CPU with as many threads, when training draws from torch's, numpy's or Python's
            global generators or from :meth:`Round.permutation`).
        example_inputs: as in :func:`sparsekit.convert`; also lets the ledger measure masked-dense steps
            where the loop counts its own by :meth:`Round.step`.
        impl: force one format, as in :func:`sparsekit.convert`.
        note: JSON values kept in the run's configuration (data set, seed, …) and compared on relaunch.
        score_at: ``"end"`` scores the weights that the round before trained, ``"init"`` the first ones, for
            pruning at initialisation (SNIP, GraSP, SynFlow).
        refill: ``"block:8x1"``, another block or ``"channel"``: one more round, in which the last ticket is regrouped
            (:func:`sparsekit.regroup`) and turned into that pattern at its density, layer by layer but for the output
            layer (:func:`sparsekit.refill`), and trained from the rewind point. Lossy; its weights are in the
            regrouped order, which ``end.safetensors`` keeps.
        steps, least, data, loss: as in :func:`sparsekit.prune`; ``layer.init`` holds the first weights.

    Raises: ValueError on bad arguments, or a run directory of another configuration, before training.
    """
    return TicketSearch(
        model, rounds, rate, pattern, criterion, scope, rewind, run_dir, exclude, example_inputs, impl, note,
        score_at, refill, {"steps": steps, "least": least, "data": data, "loss": loss},
    )  # fmt: skip
