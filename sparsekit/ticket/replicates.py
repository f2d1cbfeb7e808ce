"""Many small trainings in one: seeds, re-initialised controls and random masks stepped together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device
from ..data import Dataset
from ..nn import SparseLinear
from ..nn.stack import Stack
from .direct import direct_logits, direct_step
from .loop import Round, TicketSearch
from .rewind import get_rng, set_rng
from .train import Fit, Training, fit, masked_sampler, means

__all__ = ["crews", "fit_together", "in_step", "stack_step", "train_round_together", "train_rounds_together"]

_EVALUATED = 1000  # images of one evaluation
_TOGETHER = (
    150_000  # weights of networks that a CPU trains faster as one: with their moments they fill its second cache
)


def fit_together(
    models: Sequence[nn.Module],
    data: Dataset | Sequence[Dataset],
    training: Training,
    order: Callable[[int, int], Tensor] | Sequence[Callable[[int, int], Tensor]],
) -> list[Fit]:
    """Train replicates of one architecture together; each ends as :func:`fit` alone would leave it, up to rounding.

    ``models`` are converted or dense and keep their own masks; their weights are replaced by the trained
    ones. ``data`` and ``order(count, epoch)``, which gives each epoch's permutation, are one for all (a batch is
    then read once) or one per model, of data sets of the same sizes. Returns one :class:`Fit` per model, its
    seconds an equal share of the whole.

    Raises: ValueError as :class:`sparsekit.nn.stack.Stack` does, or when data, orders and models differ in number.
    """
    if not models:
        raise ValueError("Expected models to train, got none")
    shared = callable(order) and isinstance(data, Dataset)
    count = 1 if shared else len(models)
    orders = [order] * count if callable(order) else list(order)
    sets = [data] * count if isinstance(data, Dataset) else list(data)
    for what, given in (("order", orders), ("data set", sets)):
        if len(given) != count:
            raise ValueError(f"Expected one {what} per model, got {len(given)} for {count}")
    sizes = {(len(one.train_y), len(one.val_y), len(one.test_y)) for one in sets}
    if len(sizes) > 1:
        raise ValueError(f"Expected data sets of the same sizes, got {sorted(sizes)}")
    found: list[Fit] = []
    for crew in crews(models):
        its = slice(0, 1) if shared else slice(crew.start, crew.stop)
        found += _fit_crew(models[crew.start : crew.stop], sets[its], training, orders[its])
    return found


def _fit_crew(
    models: Sequence[nn.Module], sets: list[Dataset], training: Training, orders: list[Callable]
) -> list[Fit]:
    """Train models as one; data sets and orders are one for all or one each."""
    if len(models) == 1:
        return [fit(models[0], sets[0], training, orders[0])]
    data, shared = sets[0], len(sets) == 1
    stack = Stack(models, data.train_x[: training.batch_size], shared).train()
    optimizer = training.make_optimizer(stack)
    scheduler, step = training.make_scheduler(optimizer), stack_step(stack, optimizer)
    per_epoch = max(1, len(data.train_y) // training.batch_size)
    count, seconds, eval_seconds = len(stack.models), 0.0, 0.0
    best = [(float("inf"), 0)] * count
    kept: list[list[Tensor]] = [[] for _ in range(count)]
    epoch, batches = -1, []
    clock = time.perf_counter()
    for iteration in range(training.iterations):
        if iteration // per_epoch != epoch:
            epoch = iteration // per_epoch
            perms = [one(len(data.train_y), epoch).to(data.train_y.device) for one in orders]
            batches = [perm.split(training.batch_size) for perm in perms]
        now = [split[iteration % per_epoch] for split in batches]
        x = _side_by_side([one.train_x[batch] for one, batch in zip(sets, now, strict=True)])
        y = torch.stack([one.train_y[batch] for one, batch in zip(sets, now, strict=True)]).expand(count, -1)
        step(x, y)
        if scheduler is not None:
            scheduler.step()
        done = iteration + 1
        if done % training.eval_every == 0 or done == training.iterations:
            device.settle()
            seconds, clock = seconds + time.perf_counter() - clock, time.perf_counter()
            losses, _ = _evaluate(stack, [(one.val_x, one.val_y) for one in sets])
            for number, loss in enumerate(losses):
                if loss < best[number][0] or not kept[number]:
                    best[number] = (loss, done)
                    kept[number] = [tensor.clone() for tensor in stack.state(number)]
            eval_seconds, clock = eval_seconds + time.perf_counter() - clock, time.perf_counter()
    _, final = _evaluate(stack, [(one.test_x, one.test_y) for one in sets])
    stack.write_back()
    for number, tensors in enumerate(kept):
        for tensor, value in zip(stack.state(number), tensors, strict=True):
            tensor.copy_(value)
    _, at_best = _evaluate(stack, [(one.test_x, one.test_y) for one in sets])
    eval_seconds += time.perf_counter() - clock
    step_us = seconds / max(1, training.iterations) / count * 1e6
    return [
        Fit(
            at_best[i], final[i], best[i][0], best[i][1], seconds / count, eval_seconds / count, 0.0, step_us, step_us,
            training.iterations,
        )
        for i in range(count)
    ]  # fmt: skip


def crews(models: Sequence[nn.Module]) -> list[range]:
    """Which models train as one, those that follow each other: all, but perceptrons on a CPU only while they are small.

    Larger ones leave the caches, and lose by it what several save by sharing a step. Sizes decide, not the clock, so
    that a run can be repeated.
    """
    owners = [m for model in models for m in model.modules() if m._parameters]
    perceptrons = all(isinstance(m, nn.Linear | SparseLinear) for m in owners)
    if not perceptrons or not all(p.is_cpu for m in owners for p in m.parameters()):
        return [range(len(models))]
    found: list[range] = []
    room = 0
    for number, model in enumerate(models):
        size = sum(p.numel() for p in model.parameters())
        if number == 0 or size > room:
            found.append(range(number, number))
            room = _TOGETHER
        found[-1], room = range(found[-1].start, number + 1), room - size
    return found


def stack_step(stack: Stack, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    """One training step of all replicates on ``x`` as the stack takes it and labels ``y [R, N]``."""
    if (written := direct_step(stack, optimizer)) is not None:
        return written
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(x: Tensor, y: Tensor) -> None:
        # the sum of the replicates' means, in rows that softmax reads in order
        total = F.cross_entropy(stack(x).flatten(0, 1), y.flatten(), reduction="sum")
        (total / y.shape[1]).backward()
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return step


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of each replicate: ``logits [R, N, classes]``, ``y [R, N]``."""
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """``[R, N, ...]`` of R batches, lying in memory as the stack reads them; of one, which all share, itself."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, 1).transpose(0, 1)


@torch.no_grad()
def _evaluate(stack: Stack, sets: list[tuple[Tensor, Tensor]]) -> tuple[list[float], list[float]]:
    """Each replicate's mean cross-entropy and accuracy, in eval mode."""
    logits_of = direct_logits(stack.eval())
    loss, hits, count = 0.0, 0, len(sets[0][1])
    for at in range(0, count, _EVALUATED):
        part = slice(at, at + _EVALUATED)
        target = torch.stack([y[part] for _, y in sets]).expand(len(stack.models), -1)
        x = [x[part] for x, _ in sets]
        logits = logits_of(x[0] if stack.shared_input else _side_by_side(x))
        loss = loss + _losses(logits, target).double() * target.shape[1]
        hits = hits + (logits.argmax(2) == target).sum(1)
    stack.train()
    return (loss / count).tolist(), (hits / count).tolist()


def train_round_together(
    round_: Round,
    data: Dataset,
    training: Training,
    controls: Sequence[str] = (),
    fresh: Callable[[int], nn.Module] | None = None,
    seed: int = 0,
) -> Fit:
    """:func:`train_round` with the ticket and all its controls in one training, on the same batches.

    For searches that rewind to the start, of networks that :class:`sparsekit.nn.stack.Stack` takes; raises
    ValueError for others. The ledger's line counts an equal share of the training for each.
    """
    return train_rounds_together([round_], [data], training, controls, [fresh], [seed])[0]


def train_rounds_together(
    rounds: Sequence[Round],
    data: Sequence[Dataset],
    training: Training,
    controls: Sequence[str] = (),
    fresh: Sequence[Callable[[int], nn.Module] | None] = (),
    seeds: Sequence[int] = (),
) -> list[Fit]:
    """:func:`train_round_together` for the rounds of several searches, each with its own data and seed."""
    if any(round_.rewind.kind != "weights" or round_.rewind.count for round_ in rounds):
        raise ValueError("Expected rewind='init' to train controls together with the ticket, got another")
    models, owners, runs = [], [], []
    with torch.random.fork_rng():  # the next round must not depend on whether there are controls
        for owner, (round_, make, seed) in enumerate(zip(rounds, fresh, seeds, strict=True)):
            runs.append({"": [len(models)]})
            models.append(round_.model)
            for text in controls if round_.masks else ():
                done = runs[-1].setdefault(text, [])
                own = seed + 1000 + round_.number + 100_000 * len(done)  # as train_round seeds them
                new = make(own) if text == "reinit" and make is not None else None
                done.append(len(models))
                models.append(round_.control(text, own, new)[0])
            owners += [owner] * (len(models) - len(owners))
    if len(rounds) == 1:
        fits = fit_together(models, data[0], training, rounds[0].permutation)
    else:
        orders = [rounds[owner].permutation for owner in owners]
        fits = fit_together(models, [data[owner] for owner in owners], training, orders)
    spent = [fit.train_seconds + fit.eval_seconds for fit in fits]
    for round_, own, one in zip(rounds, runs, data, strict=True):
        samples: list[float] = []
        masked_sampler(round_, one, training, samples)()
        masked_us, steps = statistics.median(samples), training.iterations
        round_.step(steps)
        mine = [number for numbers in own.values() for number in numbers]
        found = {text: means([asdict(fits[n]) for n in numbers]) for text, numbers in own.items() if text}
        line = asdict(fits[mine[0]])
        line |= {"masked_dense_step_us": masked_us, "masked_dense_seconds": masked_us * steps / 1e6}
        line |= {"others_seconds": sum(spent) - sum(spent[n] for n in mine)} if len(rounds) > 1 else {}
        shared = sum(spent[n] for n in mine[1:])
        round_.record(**line, **({"controls": found, "control_seconds": shared} if found else {}))
    return [fits[own[""][0]] for own in runs]


def in_step(searches: Iterable[TicketSearch]) -> Iterator[list[tuple[int, Round]]]:
    """The open rounds of several searches, ``(number of the search, round)``, a round number at a time.

    Each search is begun when it is asked for, and finds the generators as it left them; one that was resumed
    further on waits for the others.
    """
    runs: list[Iterator[Round]] = []
    opened: list[Round | None] = []
    states = []
    for search in searches:
        runs.append(iter(search))
        opened.append(next(runs[-1], None))
        states.append(get_rng())
    while waiting := [round_.number for round_ in opened if round_ is not None]:
        now = [(i, r) for i, r in enumerate(opened) if r is not None and r.number == min(waiting)]
        yield now
        for i, _ in now:
            set_rng(states[i])
            opened[i] = next(runs[i], None)
            states[i] = get_rng()
