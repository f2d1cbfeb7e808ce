"""``sparsekit ticket``: from names on the command line to a finished run directory."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch

from .. import data as datasets
from .. import device, models
from ..report import ledger_table
from .loop import tickets
from .rewind import Rewind
from .train import Training, train_round

__all__ = ["search"]


def search(args: Namespace) -> dict:
    """Run the search that ``args`` describes; prints the ledger and returns the summary."""
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    data = datasets.load(args.data, args.data_dir, seed=args.seed)
    shape, classes = tuple(data.train_x.shape[1:]), data.classes
    model = models.build(args.model, classes=classes, input_shape=shape, seed=args.seed).to(args.device)
    data = data.to(args.device)
    training = _training(args, len(data.train_y))
    rewind = Rewind.parse(args.rewind)
    if rewind.kind == "weights" and rewind.step(len(data.train_y) // training.batch_size) >= training.iterations:
        raise ValueError(f"Expected --rewind to a step before the last, {training.iterations}, got {args.rewind}")
    rate, exclude = models.rates(args.model, args.rate), ()
    if args.pattern == "channel":  # a channel of the output layer is a class
        exclude = (models.output_layer(model),)
        rate.pop(exclude[0], None)
    if args.scope == "global":
        rate = rate["*"]
    torch.manual_seed(args.seed)
    run = tickets(
        model, args.rounds, rate, args.pattern, args.criterion, args.scope, args.rewind, args.out,
        exclude=exclude, example_inputs=data.train_x[: training.batch_size], impl=args.impl,
        note={
            "model": args.model, "data": args.data, "note": data.note, "seed": args.seed, "device": args.device,
            "iterations": training.iterations, "batch_size": training.batch_size, "optimizer": training.optimizer,
            "lr": training.lr, "threads": torch.get_num_threads(), "control": args.control,
            "cpu": device.cpu()["model"], "torch": torch.__version__,
        },
    )  # fmt: skip
    for round_ in run:
        with _bar(training.iterations, f"round {round_.number} ({100 * round_.density:.1f} % left)") as bar:
            fresh = None
            if args.control == "reinit" and round_.number:
                seed = args.seed + 1000 + round_.number  # never the seed of the ticket's own weights
                fresh = models.build(args.model, classes=classes, input_shape=shape, seed=seed).to(args.device)
            train_round(round_, data, training, lambda done, bar=bar: bar.update(done - bar.n), fresh)
    print(ledger_table(run.summary))
    print(f"run directory: {Path(args.out)}")
    return run.summary


def _check(args: Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected --device cpu, got cuda: torch sees no CUDA device here (see sparsekit info)")
    if args.rate is not None and not 0 <= args.rate < 1:
        raise ValueError(f"Expected --rate in [0, 1), got {args.rate}")
    for option in ("epochs", "iterations", "threads"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"Expected --{option} of at least 1, got {value}")


def _training(args: Namespace, images: int) -> Training:
    recipe = models.recipe(args.model)
    iterations = recipe.iterations if args.iterations is None else args.iterations
    if args.epochs is not None:
        iterations = args.epochs * max(1, images // recipe.batch_size)
    return Training(
        iterations, min(recipe.batch_size, images), recipe.optimizer, recipe.lr, eval_every=recipe.eval_every
    )


def _bar(total: int, text: str):
    """A progress bar on a terminal; nothing where there is none or tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Quiet()
    return tqdm(total=total, desc=text, unit="it", disable=not sys.stderr.isatty(), leave=False)


class _Quiet:
    n = 0

    def update(self, count: int) -> None:
        self.n += count

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        return None
