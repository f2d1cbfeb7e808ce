"""``sparsekit ticket``: from names on the command line to a finished run directory."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .. import data as datasets
from .. import device, models
from ..data import Dataset
from ..files import read_json, read_tensors, unpack_state, write_json
from ..report import ledger_table
from ..schedule import KINDS, schedule
from . import ranks
from .controls import parse
from .loop import TicketSearch, tickets
from .replicates import in_step, train_rounds_together
from .rewind import Rewind
from .solo import begin_from
from .stability import Branches, find_rewind
from .sweep import gather, variants
from .train import Training, train_round
from .workers import LAUNCHERS, each

__all__ = ["search", "stability"]

_SCORED_IMAGES, _SCORED_BATCH = 1024, 128  # what criteria that read gradients see
_ALPHAS = 11  # points on each line where only the verdict counts


def search(args: Namespace) -> dict:
    """Run the search, or the sweep of searches, that ``args`` describes; prints ledgers and verdicts.

    With several seeds each has a run directory of its own, and the study over them is returned. Started by
    ``torchrun`` all ranks train one search after the other together.
    """
    joined = ranks.join(args.device)
    with contextlib.ExitStack() as stack:
        if joined:
            stack.callback(torch.distributed.destroy_process_group)
        if ranks.rank():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        return _searches(args)


def _searches(args: Namespace) -> dict:
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.launcher == "ray":  # whose workers may stand elsewhere
        args.out, args.data_dir = Path(args.out).absolute(), datasets.data_dir(args.data_dir)
        args.data_dir = args.data_dir and args.data_dir.absolute()
    seeds, out = list(range(args.seed, args.seed + args.seeds)), Path(args.out)
    searches = variants(args)
    jobs = [(own, seed, _folder(out, name, seed, args.seeds)) for name, own in searches.items() for seed in seeds]
    if args.together:
        summaries = [summary for own in searches.values() for summary in _together([j for j in jobs if j[0] is own])]
    else:
        summaries = each(_search, jobs, args.workers, args.launcher)
    found = {name: (seeds, summaries[i * len(seeds) :][: len(seeds)]) for i, name in enumerate(searches)}
    result = gather(out, found, judged=args.seeds > 1 or bool(_controls(args)))
    print(f"run directory: {out}")
    return result


def _folder(out: Path, name: str, seed: int, seeds: int) -> Path:
    return out if not name and seeds == 1 else out / name / f"seed_{seed}"


def stability(args: Namespace) -> dict:
    """Measure the instability that ``args`` asks for; prints and returns it, and writes it to ``args.json``."""
    _check_training(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    data = datasets.load(args.data, args.data_dir, seed=args.seed).to(args.device)
    training = _training(args, len(data.train_y))
    shape = tuple(data.train_x.shape[1:])
    model = models.build(args.model, classes=data.classes, input_shape=shape, seed=args.seed).to(args.device)
    masks = None if args.ticket is None else unpack_state(*read_tensors(args.ticket))[1]
    branches = Branches(model, data, training, args.steps, args.seed)
    how = {"children": args.children, "alphas": args.alphas, "workers": args.workers}
    rows = []
    print("    step  instability %  stable  error % on the line (first pair)")
    for step in sorted(set(args.steps)):
        found = branches.instability(step, masks, **how)
        curve = "  ".join(f"{100 * error:.1f}" for error in found.curves[0][:: max(1, len(found.alphas) // 6)])
        print(f"{step:8d}  {100 * found.value:13.2f}  {'yes' if found.stable else 'no':>6}  {curve}")
        rows.append(found.row(step))
    stable = None
    for row in reversed(rows):
        if not row["stable"]:
            break
        stable = row["step"]
    print("no step is stable" if stable is None else f"stable from step {stable} on: rewind to {stable}it")
    result = {"model": args.model, "data": args.data, "seed": args.seed, "iterations": training.iterations}
    result |= {"ticket": None if args.ticket is None else str(args.ticket), "stable_from": stable, "steps": rows}
    if args.json is not None:
        write_json(args.json, result)
    return result


Job = tuple[Namespace, int, Path]  # options, seed, run directory


def _search(job: Job) -> dict:
    args, seed, out = job
    data, training, build = _material(args, seed)
    controls = _controls(args)
    run = _tickets(args, seed, out, data, training, build(seed))
    for round_ in run:
        with _bar(training.iterations, f"round {round_.number} ({100 * round_.density:.1f} % left)") as bar:
            train_round(round_, data, training, lambda done, bar=bar: bar.update(done - bar.n), controls, build, seed)
    _show(run, job)
    return run.summary


def _show(run: TicketSearch, job: Job) -> None:
    """The ledger, below its folder where it is one of several."""
    args, _, out = job
    print("\n".join([*([] if out == Path(args.out) else [f"{out}:"]), ledger_table(run.summary)]))


def _together(jobs: Sequence[Job]) -> list[dict]:
    """The searches of several seeds in step: each round's tickets and controls are one training."""
    material = [_material(args, seed) for args, seed, _ in jobs]
    runs: list[TicketSearch] = []

    def begin() -> Iterator[TicketSearch]:
        for job, (data, training, build) in zip(jobs, material, strict=True):
            runs.append(_tickets(*job, data, training, build(job[1])))
            yield runs[-1]

    for opened in in_step(begin()):
        rounds = [round_ for _, round_ in opened]
        print(f"round {rounds[0].number} ({100 * rounds[0].density:.1f} % left), {len(rounds)} searches", flush=True)
        data, trainings, fresh = zip(*(material[i] for i, _ in opened), strict=True)
        seeds = [jobs[i][1] for i, _ in opened]
        train_rounds_together(rounds, data, trainings[0], _controls(jobs[0][0]), fresh, seeds)
    for run, job in zip(runs, jobs, strict=True):
        _show(run, job)
    return [run.summary for run in runs]


def _material(args: Namespace, seed: int) -> tuple[Dataset, Training, Callable[[int], nn.Module]]:
    """Data, recipe, and a network of any seed."""
    data = datasets.load(args.data, args.data_dir, seed=seed).to(args.device)
    training = _training(args, len(data.train_y))
    if training.batch_size % ranks.count():
        raise ValueError(f"Expected ranks that divide a batch of {training.batch_size}, got {ranks.count()}")

    def build(seed: int) -> nn.Module:
        shape = tuple(data.train_x.shape[1:])
        return models.build(args.model, classes=data.classes, input_shape=shape, seed=seed).to(args.device)

    return data, training, build


def _tickets(
    args: Namespace, seed: int, out: Path, data: Dataset, training: Training, model: nn.Module
) -> TicketSearch:
    began = None
    if args.start is not None:
        began, drawn = begin_from(model, args.start)
        print(f"first weights of {args.start}; newly drawn: {', '.join(drawn) or 'none'}")
    point = _rewind(args, seed, out, data, training, model)
    rewind = Rewind.parse(point)
    if rewind.kind == "weights" and rewind.step(len(data.train_y) // training.batch_size) >= training.iterations:
        raise ValueError(f"Expected --rewind to a step before the last, {training.iterations}, got {point}")
    rounds, rate, exclude, scope = _rates(args, model)
    for generator in (torch.manual_seed, numpy.random.seed, random.seed):  # all are kept and resumed
        generator(seed)
    later = {key: getattr(training, key) for key in ("momentum", "weight_decay", "warmup", "milestones")}
    later |= {"start": began, "together": args.together, "ranks": ranks.count() if ranks.count() > 1 else 0}
    return tickets(
        model, rounds, rate, args.pattern, args.criterion, scope, point, out,
        exclude=exclude, example_inputs=data.train_x[: training.batch_size], impl=args.impl,
        score_at=args.score_at, least=args.least, data=_scored(data, seed), refill=_refill(args.refill),
        note={
            "model": args.model, "data": args.data, "note": data.note, "seed": seed, "device": args.device,
            "iterations": training.iterations, "batch_size": training.batch_size, "optimizer": training.optimizer,
            "lr": training.lr, "threads": torch.get_num_threads(), "control": args.control,
            "cpu": device.cpu()["model"], "torch": torch.__version__,
        } | {key: value for key, value in later.items() if value},
    )  # fmt: skip


def _rewind(args: Namespace, seed: int, out: Path, data: Dataset, training: Training, model: nn.Module) -> str:
    """Where to rewind to; ``auto`` is the first step whose children are linearly connected, looked for once."""
    if args.rewind != "auto":
        return args.rewind
    path = Path(out) / "stability.json"
    if not path.exists():
        step, known = find_rewind(model, data, training, seed=seed, alphas=_ALPHAS)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": args.model, "data": args.data, "seed": seed, "iterations": training.iterations}
        rows = [found.row(step) for step, found in known.items()]
        write_json(path, facts | {"ticket": None, "stable_from": step, "steps": rows})
    found = read_json(path)
    tried = ", ".join(f"{row['step']}: {100 * row['value']:.2f} %" for row in found["steps"])
    if found["stable_from"] is None:
        raise ValueError(f"Expected --rewind auto to find a step that is stable to SGD noise, got none ({tried})")
    print(f"instability {tried}: rewinding to step {found['stable_from']}")
    return f"{found['stable_from']}it"


def _rates(args: Namespace, model: nn.Module) -> tuple[int, Any, tuple[str, ...], str]:
    """Rounds, rates, layers to leave dense and scope, from the options and the model's recipe."""
    table = models.rates(args.model, args.rate)
    scope = args.scope or ("layer" if args.pattern != "unstructured" else models.recipe(args.model).scope)
    exclude = {name for name, rate in table.items() if rate == 0} if args.rate != 0 else set()
    if args.pattern == "channel":  # a channel of the output layer is a class
        exclude.add(models.output_layer(model))
    table = {name: rate for name, rate in table.items() if name not in exclude}
    if args.density is not None:
        rates = schedule(args.density, args.rounds, args.schedule)
        return len(rates), rates, tuple(exclude), scope
    return args.rounds, table if scope == "layer" else table["*"], tuple(exclude), scope


def _refill(text: str | None) -> str | None:
    """``8x1`` is short for ``block:8x1``."""
    return f"block:{text}" if re.fullmatch(r"\d+x\d+", text or "") else text


def _scored(data: Dataset, seed: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))[:_SCORED_IMAGES]
    order = order.to(data.train_y.device)
    return list(zip(data.train_x[order].split(_SCORED_BATCH), data.train_y[order].split(_SCORED_BATCH), strict=True))


def _controls(args: Namespace) -> list[str]:
    return [] if args.control == "none" else args.control.split(",")


def _check_training(args: Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected --device cpu, got cuda: torch sees no CUDA device here (see sparsekit info)")
    for option in ("epochs", "iterations", "threads", "seeds", "workers"):
        if (value := getattr(args, option, None)) is not None and value < 1:
            raise ValueError(f"Expected --{option} of at least 1, got {value}")


def _check(args: Namespace) -> None:
    _check_training(args)
    if args.rate is not None and not 0 <= args.rate < 1:
        raise ValueError(f"Expected --rate in [0, 1), got {args.rate}")
    if args.rate is not None and args.density is not None:
        raise ValueError("Expected --rate or --density, got both")
    if args.schedule != KINDS[0] and args.density is None:
        raise ValueError(f"Expected --density with --schedule {args.schedule}, got none")
    for text in _controls(args):
        parse(text)
    if args.seeds > 1 and importlib.util.find_spec("scipy") is None:
        raise ImportError("Expected scipy for intervals over seeds, got none; pip install scipy")
    apart = args.workers > 1 or args.launcher != LAUNCHERS[0]
    if apart and (args.together or ranks.count() > 1):
        raise ValueError("Expected --together and torchrun without --workers and --launcher, got both")
    if args.together and (ranks.count() > 1 or args.rewind != "init"):
        got = f"--rewind {args.rewind}" if args.rewind != "init" else f"{ranks.count()} ranks"
        raise ValueError(f"Expected --rewind init and one process with --together, got {got}")
    if (args.together or ranks.count() > 1) and ("linear" in _controls(args) or "auto" in args.rewind.split(",")):
        raise ValueError("Expected --control linear and --rewind auto in a process and training of their own, got both")


def _training(args: Namespace, images: int) -> Training:
    """The model's recipe; in a shorter training warm-up and milestones come as much sooner."""
    recipe = models.recipe(args.model)
    iterations = recipe.iterations if args.iterations is None else args.iterations
    if args.epochs is not None:
        iterations = args.epochs * max(1, images // recipe.batch_size)

    def scaled(step: int) -> int:
        return step * iterations // recipe.iterations

    return Training(
        iterations, min(recipe.batch_size, images), recipe.optimizer, recipe.lr, recipe.momentum, recipe.weight_decay,
        recipe.eval_every, scaled(recipe.warmup), tuple(map(scaled, recipe.milestones)),
    )  # fmt: skip


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
