"""What the whole LeNet figure costs: 13 tickets, 12 re-initialised and 12 random controls, sparse against masked dense.

    SPARSEKIT_DATA=DIR python benchmarks/lenet_figure.py --run runs/lenet-figure --threads 2 --json OUT.json
    SPARSEKIT_DATA=DIR python benchmarks/lenet_figure.py --wall 500 --threads 1 --json OUT.json

The first times steps. The tickets are real, of a search with short rounds that is kept in ``--run`` (12 rounds of 20 %,
300 steps each). At each round's masks a training step (forward, backward, fused Adam, batch 60) is timed in one
interleaved run, per network: masked dense (``weight * mask``) by torch's own loop; ours alone, and as ``--together``
trains the round's three networks; ours by torch's loop (``autograd``), which tells what writing the step out gains;
and, as the best that dense can do, networks without any mask by the written-out step (``dense``). Costs are added in
units of the masked-dense step beside them, so that a round the machine was slow in weighs no more than others.

``--wall`` runs the figure twice, whole, with rounds of so many steps: search, controls, evaluations every 100 steps,
conversion, the ledger and files; by sparsekit with ``--together``, and masked dense, in turns, same masks.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import sparsekit as sk
from sparsekit import data, models
from sparsekit.bench import environment
from sparsekit.export.packed import read_portable
from sparsekit.files import write_json
from sparsekit.nn import streamline
from sparsekit.nn.stack import Stack
from sparsekit.plan import measure
from sparsekit.ticket.controls import control
from sparsekit.ticket.ledger import masked_dense
from sparsekit.ticket.replicates import crews, stack_step, train_round_together
from sparsekit.ticket.store import round_path
from sparsekit.ticket.train import Training, fit, make_step, torch_step, train_round

MODEL, BATCH, ROUNDS, STEPS = "lenet-300-100", 60, 12, 300
CONTROLS = ("reinit", "random")


def search(run: Path) -> None:
    """The tickets, where they are not there yet."""
    dataset = data.load("mnist")
    for round_ in _tickets(run, dataset):
        train_round(round_, dataset, Training(STEPS, BATCH))


def _tickets(run: Path, dataset: data.Dataset):
    torch.manual_seed(0)
    model, example = models.build(MODEL, seed=0), dataset.train_x[:BATCH]
    return sk.tickets(model, ROUNDS, models.rates(MODEL), run_dir=run, example_inputs=example, impl="csr")


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return Training(1).make_optimizer(model)


def alone(networks, x, y, make):
    """One training step of each network."""
    own = copy.deepcopy(list(networks))
    for model in own:
        streamline(model.train())
    steps = [make(model, _optimizer(model)) for model in own]

    def run_all():
        for step in steps:
            step(x, y)

    return run_all


def together(networks, x, y):
    """The same as ``fit_together`` runs them: as many as one as train faster so."""
    steps: list = []
    for crew in crews(networks):
        own = copy.deepcopy(networks[crew.start : crew.stop])
        if len(own) == 1:
            steps.append((alone(own, x, y, make_step), ()))
        else:
            stack = Stack(own, x, shared_input=True).train()
            steps.append((stack_step(stack, _optimizer(stack)), (x, y.expand(len(own), -1))))

    def run_all():
        for step, batch in steps:
            step(*batch)

    return run_all


def round_us(run: Path, number: int, x, y, seconds: float) -> dict:
    """Microseconds that a step of one of the round's networks takes, each way."""
    dense = [models.build(MODEL, seed=seed) for seed in range(3 if number else 1)]
    nets, masked = dense, dense
    if number:
        _, masks, _ = read_portable(round_path(run, number) / "trained.safetensors")
        _, random = control("random", dense[2].state_dict(), masks, number)
        each = (masks, masks, random)
        nets = [sk.convert(m, mask, x, training=True, impl="csr") for m, mask in zip(dense, each, strict=True)]
        masked = [masked_dense(m, mask) for m, mask in zip(dense, each, strict=True)]
    ways = {
        "masked": alone(masked, x, y, torch_step),
        "dense": alone(dense, x, y, make_step),
        "autograd": alone(nets, x, y, torch_step),
        "alone": alone(nets, x, y, make_step),
        "together": together(nets, x, y),
    }
    return {way: us / len(nets) for way, us in measure(ways, seconds).items()}


def totals(rows: list[dict]) -> dict[str, float]:
    """How many times as fast as masked dense each way draws the figure."""
    trainings = [3 if row["round"] else 1 for row in rows]
    ways = [way for way in rows[0] if way != "round"]
    cost = {w: sum(n * row[w] / row["masked"] for n, row in zip(trainings, rows, strict=True)) for w in ways}
    return {way: sum(trainings) / cost[way] for way in ways}


class _Plain(nn.Linear):
    """nn.Linear by another name, which is trained by torch's own loop."""


def wall(iterations: int, run: Path) -> list[dict]:
    """Seconds that each round of the figure takes, whole, ours and masked dense."""
    dataset, training = data.load("mnist"), Training(iterations, BATCH)
    fit(models.build(MODEL, seed=0), dataset, Training(20, BATCH), lambda count, epoch: torch.arange(count))
    found = iter(_tickets(run, dataset))  # the first optimizer of a process imports half of torch: nobody pays for it
    rows = []
    for number in range(ROUNDS + 1):
        clock = time.perf_counter()
        round_ = next(found)
        train_round_together(round_, dataset, training, CONTROLS, lambda seed: models.build(MODEL, seed=seed))
        trained = time.perf_counter()
        masks = {name: mask.clone() for name, mask in round_.masks.items()}
        rivals = _rivals(masks, number)
        for model in rivals:
            fit(model, dataset, training, round_.permutation)
        done = time.perf_counter()
        rows.append({"round": number, "ours": trained - clock, "masked": done - trained})
        ours, masked = rows[-1]["ours"], rows[-1]["masked"]
        print(f"round {number:2d}  ours {ours:6.2f} s  masked dense {masked:6.2f} s", flush=True)
    clock = time.perf_counter()
    if next(found, None) is not None:
        raise RuntimeError("Expected the search to end with its last round")
    rows[-1]["ours"] += time.perf_counter() - clock
    return rows


def _rivals(masks: dict[str, torch.Tensor], number: int) -> list[nn.Module]:
    dense = [models.build(MODEL, seed=seed) for seed in range(3 if number else 1)]
    if not number:
        for module in dense[0]:
            module.__class__ = _Plain if type(module) is nn.Linear else type(module)
        return dense
    _, random = control("random", dense[2].state_dict(), masks, number)
    return [masked_dense(m, mask) for m, mask in zip(dense, (masks, masks, random), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/lenet-figure"))
    parser.add_argument("--wall", type=int, metavar="STEPS", help="run the whole figure, rounds of so many steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring each way in each round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--note", default="", help="kept in the file: what else ran on the machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {"environment": environment(), "threads": args.threads, "batch": BATCH, "note": args.note}
    if args.wall:
        with tempfile.TemporaryDirectory() as folder:
            rows = wall(args.wall, Path(folder))
        ours, masked = (sum(row[who] for row in rows) for who in ("ours", "masked"))
        words = f"{masked:.1f} s masked dense, {ours:.1f} s ours, {masked / ours:.2f}x"
        print(f"the figure, {args.threads} threads, {args.wall} steps a training: {words}")
        facts |= {"steps": args.wall, "seconds": rows, "ratio": masked / ours}
    else:
        facts |= steps(args)
    if args.json:
        write_json(args.json, facts)


def steps(args: argparse.Namespace) -> dict:
    """Every round's steps, timed and printed."""
    search(args.run)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 1, 28, 28, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    rows = []
    for number in range(ROUNDS + 1):
        rows.append({"round": number, **round_us(args.run, number, x, y, args.seconds)})
        row = rows[-1]
        words = "  ".join(f"{way} {row[way]:5.0f} us ({row['masked'] / row[way]:.2f}x)" for way in list(row)[1:])
        print(f"round {number:2d}  {words}", flush=True)
    ratios = totals(rows)
    words = ", ".join(f"{way} {ratio:.2f}x" for way, ratio in list(ratios.items())[1:])
    print(f"the figure, {args.threads} threads, against masked dense: {words}")
    return {"rows": rows, "ratios": ratios}


if __name__ == "__main__":
    main()
