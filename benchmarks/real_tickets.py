"""Speed of a ticket that a search found, not of a random mask: LeNet-300-100 on MNIST at 3.5 % of its weights.

    SPARSEKIT_DATA=DIR python benchmarks/real_tickets.py --run runs/lenet --out real.json

The run directory is made by the paper's recipe with short rounds (15 rounds of 20 %, 600 steps each) and kept, so the
second call only measures. Rivals of the ticket at batch 60: plain dense torch with the ticket's weights, and for a
training step (forward, backward, fused Adam) also dense layers that multiply weight and mask. Beside it, the
same densities with survivors drawn at random.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch

import sparsekit as sk
from sparsekit import data, models
from sparsekit.bench import environment
from sparsekit.export.packed import read_portable
from sparsekit.plan import measure
from sparsekit.ticket.ledger import masked_dense
from sparsekit.ticket.store import round_path
from sparsekit.ticket.train import Training, make_step, train_round

BATCH = 60


def find(run: Path, dataset, rounds: int, iterations: int):
    """The model and the last round's masks of the run, searched for where it is not finished."""
    model = models.build("lenet-300-100", seed=0)
    torch.manual_seed(0)
    training = Training(iterations, BATCH)
    search = sk.tickets(
        model, rounds, models.rates("lenet-300-100"), rewind="init", run_dir=run, example_inputs=dataset.train_x[:BATCH]
    )
    for round_ in search:
        result = train_round(round_, dataset, training)
        print(f"round {round_.number:2d}: {100 * round_.density:5.1f} % left, {100 * result.test_accuracy:.2f} %")
    state, masks, _ = read_portable(round_path(run, rounds) / "trained.safetensors")
    model.load_state_dict(state)
    return model, masks, search.summary["rounds"][-1]["test_accuracy"]


def shuffled(masks):
    """Masks of the same density in each layer, survivors anywhere."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in masks.items()
    }


def compare(model, masks, x, y) -> dict:
    """Times in us of inference and of a training step, dense and converted, and their ratios."""
    serving, training = (sk.convert(model, masks, x, flag) for flag in (False, True))
    dense = copy.deepcopy(model).eval()
    twins = {"dense": copy.deepcopy(model), "masked": masked_dense(model, masks), "converted": training}
    steps = {name: make_step(twin.train(), Training(1).make_optimizer(twin)) for name, twin in twins.items()}

    def forward(net):
        def run():
            with torch.no_grad():
                return net(x)

        return run

    infer = measure({"dense": forward(dense), "converted": forward(serving.eval())}, 1.0)
    step = measure({name: lambda step=step: step(x, y) for name, step in steps.items()}, 1.0)
    return {
        "forward_us": infer, "step_us": step, "forward": infer["dense"] / infer["converted"],
        "step": step["dense"] / step["converted"], "masked_step": step["masked"] / step["converted"],
        "formats": [{layer.name: layer.chosen for layer in sk.explain(net).layers} for net in (serving, training)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="default: $SPARSEKIT_DATA")
    parser.add_argument("--run", type=Path, required=True, help="run directory of the search; goes on where it stopped")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--search-only", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = data.load("mnist", args.data_dir)
    model, masks, accuracy = find(args.run, dataset, args.rounds, args.iterations)
    if args.search_only:
        return
    density = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    x, y = dataset.train_x[:BATCH], dataset.train_y[:BATCH]
    rows = {"ticket": compare(model, masks, x, y)}
    random = shuffled(masks)
    for name, mask in random.items():
        model.get_parameter(name).data.mul_(mask)
    rows["random mask"] = compare(model, random, x, y)
    print(f"LeNet-300-100, {100 * density:.1f} % left, {100 * accuracy:.2f} % on MNIST, batch {BATCH}, "
          f"{args.threads} threads")  # fmt: skip
    for name, row in rows.items():
        print(f"{name:12} inference {row['forward']:.1f}x, step {row['step']:.1f}x of dense, "
              f"{row['masked_step']:.1f}x of masked dense; {row['formats']}")  # fmt: skip
    if args.out:
        facts = {"environment": environment(), "threads": args.threads, "density": density, "accuracy": accuracy}
        args.out.write_text(json.dumps(facts | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
