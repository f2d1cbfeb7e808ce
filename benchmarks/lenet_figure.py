"""What the whole LeNet figure costs: 13 tickets, 12 re-initialised and 12 random controls, sparse against masked dense.

    SPARSEKIT_DATA=DIR python benchmarks/lenet_figure.py --run runs/lenet-figure --threads 2 --json OUT.json

The tickets are real, of a search with short rounds that is kept in ``--run`` (12 rounds of 20 %, 300 steps each). At
each round's masks a training step (forward, backward, fused Adam, batch 60) is timed in one interleaved run: masked
dense (``weight * mask``); ours, each network alone; ours, the round's three networks as one (``--together``);
and, as the best that dense can do, three dense networks as one without any mask. A figure of so many
equal trainings costs the sum of its steps, which is what is compared, in units of the masked-dense step beside it;
evaluations and planning are left out.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

import sparsekit as sk
from sparsekit import data, models
from sparsekit.bench import environment
from sparsekit.export.packed import read_portable
from sparsekit.files import write_json
from sparsekit.nn.stack import Stack
from sparsekit.plan import measure
from sparsekit.ticket.controls import control
from sparsekit.ticket.ledger import masked_dense
from sparsekit.ticket.replicates import stack_step
from sparsekit.ticket.store import round_path
from sparsekit.ticket.train import Training, make_step, train_round

MODEL, BATCH, ROUNDS, STEPS = "lenet-300-100", 60, 12, 300


def search(run: Path) -> None:
    """The tickets, where they are not there yet."""
    dataset = data.load("mnist")
    torch.manual_seed(0)
    found = sk.tickets(
        models.build(MODEL, seed=0), ROUNDS, models.rates(MODEL), run_dir=run, example_inputs=dataset.train_x[:BATCH],
        impl="csr",
    )  # fmt: skip
    for round_ in found:
        train_round(round_, dataset, Training(STEPS, BATCH))


def together(nets, x, y):
    """One training step of several networks as one."""
    stack = Stack(copy.deepcopy(nets), x, shared_input=True).train()
    step, labels = stack_step(stack, Training(1).make_optimizer(stack)), y.expand(len(nets), -1)
    return lambda: step(x, labels)


def round_us(run: Path, number: int, x, y, seconds: float) -> dict:
    """Microseconds that a step of all the round's networks takes, each way."""
    dense = [models.build(MODEL, seed=seed) for seed in range(3 if number else 1)]
    nets, masked = dense, dense
    if number:
        _, masks, _ = read_portable(round_path(run, number) / "trained.safetensors")
        _, random = control("random", dense[2].state_dict(), masks, number)
        each = (masks, masks, random)
        nets = [sk.convert(m, mask, x, training=True) for m, mask in zip(dense, each, strict=True)]
        masked = [masked_dense(m, mask) for m, mask in zip(dense, each, strict=True)]

    def alone(models):
        steps = [make_step(m.train(), Training(1).make_optimizer(m)) for m in copy.deepcopy(list(models))]

        def run_all():
            for step in steps:
                step(x, y)

        return run_all

    ways = {"masked": alone(masked), "alone": alone(nets)}
    if number:
        ways |= {"together": together(nets, x, y), "dense_together": together(dense, x, y)}
    times = measure(ways, seconds)
    if not number:  # one network has no one to go with
        times |= {"together": times["alone"], "dense_together": times["masked"]}
    return times


def totals(rows: list[dict]) -> tuple[dict[str, float], float]:
    """How many times as fast as masked dense each way draws the figure, and ours together than dense together.

    Masked dense does the same arithmetic in every round, so its step is the unit of cost: a round that the
    machine was slow in weighs no more than others.
    """
    trainings = [3 if row["round"] else 1 for row in rows]
    ways = [way for way in rows[0] if way != "round"]
    cost = {w: sum(n * row[w] / row["masked"] for n, row in zip(trainings, rows, strict=True)) for w in ways}
    return {way: sum(trainings) / cost[way] for way in ways}, cost["dense_together"] / cost["together"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/lenet-figure"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="of measuring each way in each round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--note", default="", help="kept in the file: what else ran on the machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    search(args.run)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 1, 28, 28, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    rows = []
    for number in range(ROUNDS + 1):
        rows.append({"round": number, **round_us(args.run, number, x, y, args.seconds)})
        row = rows[-1]
        words = "  ".join(f"{way} {row[way]:7.0f} us ({row['masked'] / row[way]:.2f}x)" for way in list(row)[1:])
        print(f"round {number:2d}  {words}", flush=True)
    ratios, best = totals(rows)
    print(
        f"the figure, {args.threads} threads: alone {ratios['alone']:.2f}x, together {ratios['together']:.2f}x masked "
        f"dense; together {best:.2f}x dense networks as one"
    )
    if args.json:
        facts = {"environment": environment(), "threads": args.threads, "batch": BATCH}
        write_json(args.json, facts | {"note": args.note, "rows": rows, "ratios": ratios, "dense_together": best})


if __name__ == "__main__":
    main()
