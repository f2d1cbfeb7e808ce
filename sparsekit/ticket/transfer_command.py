"""``sparsekit transfer``: a run's ticket on other data or by another optimizer, beside dense and random tickets."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from statistics import fmean

import torch

from .. import data as datasets
from .. import models
from ..files import read_json, write_json
from .command import _check_training, _training
from .round import plain
from .solo import read_round, read_start, solo
from .transfer import transfer
from .verdict import judge

__all__ = ["transfer_run"]


def transfer_run(args: Namespace) -> dict:
    """Train the ticket of ``args.source`` on ``args.data`` as it asks; prints and returns what was found.

    For each seed a newly drawn network three times: dense, with the ticket's weights and masks, and with masks as
    dense drawn at random. ``args.json`` also gets the runs.
    """
    _check_training(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    masks = read_round(args.source, args.round)[1]
    state = read_start(args.source)
    config = read_json(args.source / "config.json")
    args.model = args.model or config.get("model")
    if args.model is None:
        raise ValueError(f"{args.source}: Expected --model for a run that names none, got neither")
    if args.iterations is None and args.epochs is None:
        args.iterations = config.get("iterations")
    runs: dict[str, list[dict]] = {"dense": [], "ticket": [], "random": []}
    for seed in range(args.seed, args.seed + args.seeds):
        data = datasets.load(args.data, args.data_dir, seed=seed).to(args.device)
        training = _training(args, len(data.train_y))
        if args.optimizer is not None:
            momentum = 0.9 if args.optimizer == "sgd" else 0.0
            training = replace(training, optimizer=args.optimizer, momentum=momentum)
        training = training if args.lr is None else replace(training, lr=args.lr)
        fresh = models.build(args.model, classes=data.classes, input_shape=data.input_shape, seed=seed + 1000)
        fresh.to(args.device)
        found = transfer(state, masks, fresh, exclude=args.exclude)
        for name, model, own in (
            ("dense", fresh, {}), ("ticket", found.model, found.masks), ("random", fresh, found.random(seed)),
        ):  # fmt: skip
            print(f"seed {seed}: {name}, {training.iterations} steps", flush=True)
            runs[name].append(solo(model, own, data, training, seed))
    verdict = judge(runs["dense"], runs["ticket"], {"random": runs["random"]}, classes=data.classes)
    print(f"{args.source} on {args.data}, {training.optimizer}; newly drawn: {', '.join(found.fresh) or 'nothing'}")
    for name, each in runs.items():
        accuracy, stop = (fmean(run[key] for run in each) for key in ("test_accuracy", "early_stop_iteration"))
        print(f"{name:7} {100 * accuracy:6.2f} %  early stop {stop:.0f}")
    print(f"verdict: {verdict}")
    result = {"run": str(args.source), "data": args.data, "training": str(training), "fresh": found.fresh}
    result |= {"verdict": plain("verdict", asdict(verdict)), "runs": runs}
    if args.json is not None:
        write_json(args.json, result)
    return result

