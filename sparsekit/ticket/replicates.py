"""Many small trainings in one: seeds, re-initialised controls and random masks stepped together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device
from ..data import Dataset
from ..nn.stack import Stack
from .loop import Round
from .train import Fit, Training, masked_sampler, means

__all__ = ["fit_together", "train_round_together"]

_EVALUATED = 1000  # images of one evaluation


def fit_together(
    models: Sequence[nn.Module],
    data: Dataset,
    training: Training,
    order: Callable[[int, int], Tensor] | Sequence[Callable[[int, int], Tensor]],
) -> list[Fit]:
    """Train replicates of one architecture together; each ends as :func:`fit` alone would leave it, up to rounding.

    ``models`` are converted or dense and keep their own masks; their weights are replaced by the trained
    ones. ``order(count, epoch)`` gives each epoch's permutation, one for all (the batch is then read once)
    or one per model. Returns one :class:`Fit` per model, its seconds an equal share of the whole.

    Raises: ValueError as :class:`sparsekit.nn.stack.Stack` does, or when orders and models differ in number.
    """
    shared = callable(order)
    orders = [order] if shared else list(order)
    if not shared and len(orders) != len(models):
        raise ValueError(f"Expected one order per model, got {len(orders)} for {len(models)}")
    stack = Stack(models, data.train_x[: training.batch_size], shared).train()
    optimizer = training.make_optimizer(stack)
    scheduler = training.make_scheduler(optimizer)
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
        x = data.train_x[now[0]] if shared else torch.stack([data.train_x[batch] for batch in now])
        y = torch.stack([data.train_y[batch] for batch in now]).expand(count, -1)
        _losses(stack(x), y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        done = iteration + 1
        if done % training.eval_every == 0 or done == training.iterations:
            device.settle()
            seconds, clock = seconds + time.perf_counter() - clock, time.perf_counter()
            losses, _ = _evaluate(stack, data.val_x, data.val_y)
            for number, loss in enumerate(losses):
                if loss < best[number][0] or not kept[number]:
                    best[number] = (loss, done)
                    kept[number] = [tensor.clone() for tensor in stack.state(number)]
            eval_seconds, clock = eval_seconds + time.perf_counter() - clock, time.perf_counter()
    _, final = _evaluate(stack, data.test_x, data.test_y)
    stack.write_back()
    for number, tensors in enumerate(kept):
        for tensor, value in zip(stack.state(number), tensors, strict=True):
            tensor.copy_(value)
    _, at_best = _evaluate(stack, data.test_x, data.test_y)
    eval_seconds += time.perf_counter() - clock
    step_us = seconds / max(1, training.iterations) / count * 1e6
    return [
        Fit(
            at_best[i], final[i], best[i][0], best[i][1], seconds / count, eval_seconds / count, 0.0, step_us, step_us,
            training.iterations,
        )
        for i in range(count)
    ]  # fmt: skip


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of each replicate: ``logits [R, N, classes]``, ``y [R, N]``."""
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)


@torch.no_grad()
def _evaluate(stack: Stack, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Each replicate's mean cross-entropy and accuracy, in eval mode."""
    stack.eval()
    loss, hits = 0.0, 0
    for part, target in zip(x.split(_EVALUATED), y.split(_EVALUATED), strict=True):
        target = target.expand(len(stack.models), -1)
        logits = stack(part if stack.shared_input else part.expand(len(stack.models), *part.shape))
        loss = loss + _losses(logits, target).double() * len(part)
        hits = hits + (logits.argmax(2) == target).sum(1)
    stack.train()
    return (loss / len(y)).tolist(), (hits / len(y)).tolist()


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
    if round_.rewind.kind != "weights" or round_.rewind.count:
        raise ValueError("Expected rewind='init' to train controls together with the ticket, got another")
    models, runs = [round_.model], {}
    with torch.random.fork_rng():  # the next round must not depend on whether there are controls
        for text in controls if round_.masks else ():
            done = runs.setdefault(text, [])
            own = seed + 1000 + round_.number + 100_000 * len(done)  # as train_round seeds them
            new = fresh(own) if text == "reinit" and fresh is not None else None
            done.append(len(models))
            models.append(round_.control(text, own, new)[0])
    fits = fit_together(models, data, training, round_.permutation)
    samples: list[float] = []
    masked_sampler(round_, data, training, samples)()
    masked_us, steps = statistics.median(samples), training.iterations
    round_.step(steps)
    found = {text: means([asdict(fits[number]) for number in numbers]) for text, numbers in runs.items()}
    spent = sum(fit.train_seconds + fit.eval_seconds for fit in fits[1:])
    line = asdict(fits[0]) | {"masked_dense_step_us": masked_us, "masked_dense_seconds": masked_us * steps / 1e6}
    round_.record(**line, **({"controls": found, "control_seconds": spent} if found else {}))
    return fits[0]
