"""Stability to SGD noise: are trainings that differ in their noise alone connected by a line of low error?

Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
arXiv:1912.05671: children of one network are trained with other data orders and augmentations, and the error
is followed along the line between their weights. Instability is the highest error on it less the mean of
its ends; below 2 % the network is stable, and tickets are found from the first step at which it is.
"""

from __future__ import annotations

import copy
import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy
import torch
from torch import Tensor, nn

from ..data import Dataset
from ..nn import convert
from ..prune import check_model
from .rewind import Snapshot, get_rng, set_rng
from .train import Training, evaluate, fit
from .workers import each

__all__ = ["Branches", "Instability", "find_rewind", "instability", "order_of", "rewind_point"]


@dataclass(frozen=True)
class Instability:
    """``value`` is the mean over pairs of children of ``values``; errors are shares in [0, 1].

    ``curves`` holds for each pair the errors at ``alphas`` (0: the first child, 1: the second).
    """

    alphas: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]
    threshold: float = 0.02

    @property
    def values(self) -> tuple[float, ...]:
        """Per pair: the highest error on the line less the mean of both ends."""
        return tuple(max(curve) - (curve[0] + curve[-1]) / 2 for curve in self.curves)

    @property
    def value(self) -> float:
        """The instability of the network."""
        return sum(self.values) / len(self.values)

    @property
    def stable(self) -> bool:
        """Whether the children are linearly connected: instability below the threshold."""
        return self.value < self.threshold

    def row(self, step: int) -> dict:
        """As JSON values, with the step that the children branched from."""
        found = {"step": step, "value": self.value, "stable": self.stable, "values": list(self.values)}
        return found | {"alphas": list(self.alphas), "curves": [list(curve) for curve in self.curves]}


def instability(
    model: nn.Module,
    train: Callable[[nn.Module, int], None],
    error: Callable[[nn.Module], float],
    children: int = 2,
    *,
    alphas: int = 30,
    seed: int = 0,
    threshold: float = 0.02,
    workers: int = 1,
    recalibrate: Callable[[nn.Module], None] | None = None,
) -> Instability:
    """Train ``children`` copies of ``model`` with different noise and follow the error between each two.

    Args:
        model: the network to branch from, dense or sparse; it is not changed.
        train: ``train(copy, seed)`` trains a copy in place to the end; order and augmentation must depend on
            ``seed`` or on torch's, numpy's and Python's generators, which are seeded with it.
        error: share of wrong answers of a trained model, in [0, 1].
        alphas: points on the line, both ends included (the paper: 30).
        workers: train so many children at a time, in processes of one thread each.
        recalibrate: called with each mixed model, to estimate batch-norm statistics anew for instance; without,
            they are mixed like weights.

    Raises: ValueError on fewer than two children or points.
    """
    check_model(model)
    for name, count in (("children", children), ("alphas", alphas)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise ValueError(f"Expected {name} as a whole number of at least 2, got {count!r}")

    def child(number: int) -> list[Tensor]:
        copied, rng = copy.deepcopy(model), get_rng()
        try:
            for seeded in (torch.manual_seed, numpy.random.seed, random.seed):
                seeded(number)
            train(copied, number)
        finally:
            set_rng(rng)
        return [tensor.detach() for tensor in (*copied.parameters(), *copied.buffers())]

    ends = each(child, range(seed, seed + children), workers)
    mixed, points = copy.deepcopy(model), [i / (alphas - 1) for i in range(alphas)]
    curves = []
    for first, second in combinations(ends, 2):
        curve = []
        for alpha in points:
            _mix(mixed, first, second, alpha)
            if recalibrate is not None:
                recalibrate(mixed)
            with torch.no_grad():
                curve.append(float(error(mixed)))
        curves.append(tuple(curve))
    return Instability(tuple(points), tuple(curves), threshold)


@torch.no_grad()
def _mix(model: nn.Module, first: Sequence[Tensor], second: Sequence[Tensor], alpha: float) -> None:
    for tensor, a, b in zip((*model.parameters(), *model.buffers()), first, second, strict=True):
        # At the ends exactly the children, and what is not a number (indices, counters) as the first has it.
        if alpha in (0, 1) or not tensor.is_floating_point():
            tensor.copy_(b if alpha == 1 else a)
        else:
            tensor.copy_(torch.lerp(a.double(), b.double(), alpha))


def rewind_point(
    steps: Sequence[int], measure: Callable[[int], Instability]
) -> tuple[int | None, dict[int, Instability]]:
    """The first of ``steps`` from which children are linearly connected, and every instability measured.

    Found by bisection, instability falling with the step (arXiv:1912.05671, figure 3): the step before the one
    that is returned was measured too and is unstable. None when the last one is.

    Raises: ValueError unless steps ascend.
    """
    steps = list(steps)
    if not steps or steps != sorted(set(steps)):
        raise ValueError(f"Expected steps in ascending order, got {steps}")
    known: dict[int, Instability] = {}

    def stable(step: int) -> bool:
        known[step] = measure(step)
        return known[step].stable

    found = bisect_left(steps, True, key=stable)
    return (steps[found] if found < len(steps) else None), dict(sorted(known.items()))


class Branches:
    """One training watched at ``steps``, to branch from each: weights, optimizer and schedule go on from there.

    ``model`` is trained as :func:`fit` does, from ``seed``; it is not changed itself.
    """

    def __init__(
        self, model: nn.Module, data: Dataset, training: Training, steps: Sequence[int], seed: int = 0
    ) -> None:
        if not steps or min(steps) < 0 or max(steps) > training.iterations:
            raise ValueError(f"Expected steps between 0 and {training.iterations}, got {list(steps)}")
        self.model, self.data, self.training, self._snapshots = copy.deepcopy(model), data, training, {}
        trunk, wanted, last = copy.deepcopy(model), set(steps), max(steps)
        state = {}

        def begin(optimizer, scheduler, per_epoch: int) -> int:
            state.update(step=0, parts=(optimizer, scheduler))
            watch(0)
            return 0

        def watch(count: int = 1) -> None:
            state["step"] += count
            if state["step"] in wanted:
                self._snapshots[state["step"]] = Snapshot.take(state["step"], trunk, *state["parts"])

        rng = get_rng()
        try:
            torch.manual_seed(seed)
            short = replace(training, iterations=last, eval_every=max(1, last))
            fit(trunk, data, short, order_of(seed), begin, watch)
        finally:
            set_rng(rng)

    def at(self, step: int, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network at a step; with ``masks`` sparse, as a ticket rewound to that step."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self._snapshot(step).model)
        if masks:
            batch = self.data.train_x[: self.training.batch_size]
            model = convert(model, masks, batch, training=True, inplace=True)
        return model

    def train(self, model: nn.Module, step: int, seed: int) -> None:
        """Train what :meth:`at` gave to the end, the data in the order of ``seed``."""
        snapshot = self._snapshot(step)

        def begin(optimizer, scheduler, per_epoch: int) -> int:
            snapshot.restore_optimizer(model, optimizer, scheduler)
            return step

        if step < self.training.iterations:
            fit(model, self.data, self.training, order_of(seed), begin)

    def instability(self, step: int, masks: Mapping[str, Tensor] | None = None, **how) -> Instability:
        """:func:`instability` of the network at a step, by the test error; ``how`` goes there."""

        def error(model: nn.Module) -> float:
            return 1 - evaluate(model, self.data.test_x, self.data.test_y)[1]

        def train(model: nn.Module, seed: int) -> None:
            self.train(model, step, seed)

        return instability(self.at(step, masks), train, error, **{"seed": 1000} | how)

    def _snapshot(self, step: int) -> Snapshot:
        if step not in self._snapshots:
            raise ValueError(f"Expected a step that was watched ({sorted(self._snapshots)}), got {step}")
        return self._snapshots[step]


def find_rewind(
    model: nn.Module,
    data: Dataset,
    training: Training,
    steps: Sequence[int] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **how,
) -> tuple[int | None, dict[int, Instability]]:
    """The smallest of ``steps`` whose children are linearly connected, and what was measured; one call.

    Trains ``model`` once, then children from the steps that bisection asks for (:func:`rewind_point`); give the
    step to ``sk.tickets(rewind=f"{step}it")``, as ``sparsekit ticket --rewind auto`` does.

    Args:
        model, data, training: a dense network, which is not changed, and how :func:`fit` is to train it.
        steps: ascending, below ``training.iterations``; default 0 and that number over 128, 64, …, 2.
        masks: of a ticket, whose sparse children then decide; None takes the dense network, which becomes stable
            a little later than its tickets (arXiv:1912.05671, figures 3 and 5).
        how: ``children``, ``alphas``, ``workers`` as in :func:`instability`.
    """
    if steps is None:
        steps = sorted({0, *(training.iterations >> shift for shift in range(1, 8))})
    branches = Branches(model, data, training, steps, seed)
    return rewind_point(steps, lambda step: branches.instability(step, masks, **how))


def order_of(seed: int) -> Callable[[int, int], Tensor]:
    """A data order of its own for every seed and epoch, as :func:`fit` takes it."""

    def order(count: int, epoch: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))

    return order
