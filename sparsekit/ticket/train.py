"""The training loop of the command line: a data set in memory, one step function for sparse and dense alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import device
from ..data import Dataset
from ..nn import streamline
from . import ranks
from .direct import direct_logits, direct_step
from .ledger import masked_dense
from .round import Round

__all__ = ["Fit", "Training", "evaluate", "fit", "fitting", "masked_sampler", "means", "train_round"]

_SAMPLES, _SAMPLE_STEPS, _WARM_STEPS = 3, 30, 5


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one training; ``iterations`` in steps, ``milestones`` divide the rate by ten.

    ``augment`` crops images at random after padding them by so many pixels, and mirrors half of them; it
    draws from torch's generator. ``cosine`` lowers the rate to zero along half a wave.
    """

    iterations: int
    batch_size: int = 60
    optimizer: str = "adam"
    lr: float = 1.2e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    eval_every: int = 100
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    augment: int = 0
    cosine: bool = field(default=False, repr=False)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over ``model``'s parameters, fused."""
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
            )
        raise ValueError(f"Expected optimizer 'adam' or 'sgd', got {self.optimizer!r}")

    def make_scheduler(self, optimizer: torch.optim.Optimizer):
        """Linear warm-up and decay as one LambdaLR, or None for a constant rate."""
        if not self.warmup and not self.milestones and not self.cosine:
            return None

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
            wave = (1 + math.cos(math.pi * min(1.0, step / self.iterations))) / 2 if self.cosine else 1.0
            return warm * wave * 0.1 ** sum(step >= milestone for milestone in self.milestones)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class Fit:
    """What one training gave: accuracies in [0, 1] on the test set, losses on the validation set.

    ``test_accuracy`` belongs to the iteration of least validation loss (the paper's early stop),
    ``final_test_accuracy`` to the last iteration.
    """

    test_accuracy: float
    final_test_accuracy: float
    val_loss: float
    early_stop_iteration: int
    train_seconds: float
    eval_seconds: float
    sample_seconds: float
    step_us: float
    median_step_us: float
    steps: int


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    """One training step on a batch, written out where it can be (:mod:`.direct`)."""
    return (ranks.count() == 1 and direct_step(model, optimizer)) or torch_step(model, optimizer)


def torch_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
    """One training step on a batch, as everyone writes it: what masked-dense models are timed by."""

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for parameter in parameters:  # what zero_grad does, without its profiling hooks
            parameter.grad = None

    return step


def _augmented(x: Tensor, padding: int) -> Tensor:
    """Each image ``[C, H, W]`` cropped at a place of its own from zero padding, and mirrored or not."""
    count, channels, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1), device=x.device)
    rows, columns = torch.arange(height, device=x.device) + top, torch.arange(width, device=x.device) + left
    columns = torch.where(torch.rand(count, 1, device=x.device) < 0.5, columns, columns.flip(1))
    image, channel = torch.arange(count, device=x.device), torch.arange(channels, device=x.device)
    return padded[image.view(-1, 1, 1, 1), channel.view(1, -1, 1, 1), rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> tuple[float, float]:
    """``(mean cross-entropy, accuracy)`` in eval mode; each rank evaluates its share."""
    flag, logits_of = model.training, direct_logits(model.eval())
    loss, hits = 0.0, 0
    for part, target in zip(ranks.share(x).split(batch), ranks.share(y).split(batch), strict=True):
        logits = logits_of(part)
        # Cross-entropy with the classes first, where torch's softmax is vectorised: few classes are slow otherwise.
        likelihood = torch.log_softmax(logits.t().contiguous(), 0).t()
        loss += float(F.nll_loss(likelihood, target, reduction="sum"))
        hits += int((logits.argmax(1) == target).sum())
    model.train(flag)
    loss, hits = ranks.total(loss, hits)
    return loss / len(y), hits / len(y)


def fit(*args, progress: Callable[[int], None] | None = None, **options) -> Fit:
    """:func:`fitting` from start to end; ``progress`` is called after every evaluation with the iteration."""
    steps = fitting(*args, **options)
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(done)


def fitting(
    model: nn.Module,
    data: Dataset,
    training: Training,
    order: Callable[[int, int], Tensor],
    begin: Callable[..., int] | None = None,
    on_step: Callable[[], None] | None = None,
    sample: Callable[[], None] | None = None,
) -> Generator[int, None, Fit]:
    """Train ``model`` on ``data``, yielding the iteration after every evaluation; what passes there is not timed.

    ``order(count, epoch)`` gives each epoch's permutation, ``begin`` is :meth:`Round.begin`, ``on_step``
    :meth:`Round.step`; ``sample`` is called a few times outside the timed steps. On several ranks each
    takes its part of every batch.
    """
    streamline(model.train())
    optimizer = training.make_optimizer(model)
    scheduler = training.make_scheduler(optimizer)
    per_epoch = max(1, len(data.train_y) // training.batch_size)
    start = begin(optimizer, scheduler, per_epoch) if begin else 0
    step = make_step(ranks.parallel(model.train()), optimizer)
    sample_at = {start + (training.iterations - start) * i // _SAMPLES for i in range(_SAMPLES)}
    best, best_at, best_state = float("inf"), start, None
    seconds = eval_seconds = sample_seconds = 0.0
    epoch, perm = -1, None
    times: list[float] = []
    clock = time.perf_counter()
    for iteration in range(start, training.iterations):
        if iteration // per_epoch != epoch:
            epoch = iteration // per_epoch
            perm = order(len(data.train_y), epoch).to(data.train_y.device).split(training.batch_size)
        if sample is not None and iteration in sample_at:
            now = time.perf_counter()
            seconds += now - clock
            sample()
            clock = time.perf_counter()
            sample_seconds += clock - now
        batch = ranks.share(perm[iteration % per_epoch])
        tick = time.perf_counter()
        x = data.train_x.index_select(0, batch)
        step(_augmented(x, training.augment) if training.augment else x, data.train_y.index_select(0, batch))
        if scheduler is not None:
            scheduler.step()
        if on_step is not None:
            on_step()
        device.settle()
        times.append(time.perf_counter() - tick)
        done = iteration + 1
        if done % training.eval_every == 0 or done == training.iterations:
            now = time.perf_counter()
            seconds += now - clock
            ranks.average_statistics(model)
            loss, _ = evaluate(model, data.val_x, data.val_y)
            if loss < best or best_state is None:
                best, best_at = loss, done
                best_state = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
            eval_seconds += time.perf_counter() - now
            yield done
            clock = time.perf_counter()
    seconds += time.perf_counter() - clock
    clock = time.perf_counter()
    _, final = evaluate(model, data.test_x, data.test_y)
    at_best = final
    if best_state is not None and best_at != training.iterations:
        at_best = _accuracy_with(model, best_state, data)
    eval_seconds += time.perf_counter() - clock
    steps = max(1, len(times))
    median = statistics.median(times or [0.0])
    return Fit(
        at_best, final, best, best_at, seconds, eval_seconds, sample_seconds, seconds / steps * 1e6, median * 1e6, steps
    )  # fmt: skip


@torch.no_grad()
def _accuracy_with(model: nn.Module, state: list[Tensor], data: Dataset) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    now = [t.detach().clone() for t in tensors]
    for tensor, value in zip(tensors, state, strict=True):
        tensor.copy_(value)
    accuracy = evaluate(model, data.test_x, data.test_y)[1]
    for tensor, value in zip(tensors, now, strict=True):
        tensor.copy_(value)
    return accuracy


def train_round(
    round_: Round,
    data: Dataset,
    training: Training,
    progress: Callable[[int], None] | None = None,
    controls: Sequence[str] = (),
    fresh: Callable[[int], nn.Module] | None = None,
    seed: int = 0,
) -> Fit:
    """Train a round, time masked-dense steps beside it, train its controls, and record the ledger's line.

    ``controls`` are names as in :meth:`Round.control`, a name given n times being trained with n seeds;
    ``fresh(seed)`` builds a newly initialised dense model for ``"reinit"``. The line holds the means of a
    control's runs, and the ``runs`` themselves where there are several.
    """
    samples: list[float] = []
    sample = masked_sampler(round_, data, training, samples)
    result = fit(round_.model, data, training, round_.permutation, round_.begin, round_.step, sample, progress=progress)
    masked_us = statistics.median(samples)
    # Median against median: other processes slow a few steps down a lot, and a sample would miss most of them.
    masked_seconds = result.train_seconds * masked_us / max(result.median_step_us, 1e-3)
    round_.record(**asdict(result), masked_dense_step_us=masked_us, masked_dense_seconds=masked_seconds)
    if controls and round_.masks:
        start = time.perf_counter()
        with torch.random.fork_rng():  # the next round must not depend on whether there are controls
            found = _train_controls(round_, data, training, controls, fresh, seed)
        round_.record(controls=found, control_seconds=time.perf_counter() - start)
    return result


def _train_controls(round_, data, training, controls, fresh, seed) -> dict[str, dict]:
    runs: dict[str, list[dict]] = {}
    for text in controls:
        done = runs.setdefault(text, [])
        own = seed + 1000 + round_.number + 100_000 * len(done)  # never the seed of the ticket's own weights
        new = fresh(own) if text == "reinit" and fresh is not None else None
        model, begin = round_.control(text, own, new)
        done.append(asdict(fit(model, data, training, round_.permutation, begin)))
    return {text: means(each) for text, each in runs.items()}


def means(runs: list[dict]) -> dict:
    """One run as it is; several as the means of their numbers, with the ``runs`` themselves."""
    if len(runs) == 1:
        return runs[0]
    return {key: statistics.fmean(run[key] for run in runs) for key in runs[0]} | {"runs": runs}


def masked_sampler(round_: Round, data: Dataset, training: Training, samples: list[float]) -> Callable[[], None]:
    """A function that times some masked-dense steps of a round and adds their microseconds to ``samples``."""
    twin = masked_dense(round_.model, round_.masks).train()
    step = torch_step(ranks.parallel(twin), training.make_optimizer(twin))
    batches = round_.permutation(len(data.train_y), 0).to(data.train_y.device).split(training.batch_size)

    def sample() -> None:
        with torch.random.fork_rng():
            for number in range(_WARM_STEPS + _SAMPLE_STEPS):
                batch = ranks.share(batches[(len(samples) + number) % len(batches)])
                start = time.perf_counter()
                step(data.train_x.index_select(0, batch), data.train_y.index_select(0, batch))
                device.settle()
                if number >= _WARM_STEPS:
                    samples.append((time.perf_counter() - start) * 1e6)

    return sample
