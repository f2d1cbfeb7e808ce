"""Regroup and refill on a real ticket: what panels of rows read, what a structured ticket costs and gains.

    python benchmarks/regroup.py --run runs/wide --json out.json

Iterative magnitude pruning of a 784-1024-1024-10 network on MNIST (rewound to init, layerwise, output layer at half
the rate) leaves tickets of about 10, 6, 3 and 2 %. For each: the share of columns that a panel of eight rows reads, in
natural and in regrouped order, beside a random mask of that density. The 10 % ticket is then refilled with vectors of
eight outputs, with and without regrouping first, its initial weights put in the same order and trained again by
the same recipe. Run it again to go on with a search that was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

import sparsekit as sk
from sparsekit import data, models
from sparsekit.bench import environment
from sparsekit.export import read_portable
from sparsekit.nn import SparseModule
from sparsekit.panels import panel_union, row_order
from sparsekit.plan import measure
from sparsekit.ticket.store import round_path
from sparsekit.ticket.train import Training, fit

NAME, HIDDEN, ROUND = "mlp:784-1024-1024-10", ("fc1.weight", "fc2.weight"), 4
RATE = 1 - 0.1 ** (1 / ROUND)


def order(count: int, epoch: int) -> torch.Tensor:
    """The data order of an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


def unions(masks: dict, density: float) -> list[dict]:
    """Columns read by panels of eight, in natural and regrouped order, for the ticket and a random mask."""
    rows = []
    for name in HIDDEN:
        chance = torch.rand(masks[name].shape, generator=torch.Generator().manual_seed(0)) < masks[name].double().mean()
        row = {"layer": name, "density": float(masks[name].double().mean()), "ticket_density": density}
        for kind, mask in (("ticket", masks[name]), ("random", chance)):
            start = time.perf_counter()
            found = row_order(mask)
            row[kind] = {"natural": panel_union(mask), "regrouped": panel_union(mask[found]),
                         "seconds": time.perf_counter() - start}  # fmt: skip
        gains = [row[kind]["regrouped"] / row[kind]["natural"] - 1 for kind in ("ticket", "random")]
        print(
            f"{name} at {row['density']:.1%}: {row['ticket']['natural']:.3f} -> {row['ticket']['regrouped']:.3f} "
            f"({gains[0]:+.1%}, random {gains[1]:+.1%}) in {row['ticket']['seconds']:.3f} s", flush=True,
        )  # fmt: skip
        rows.append(row)
    return rows


def thunks(name: str, model: nn.Module, x: torch.Tensor) -> dict:
    """A forward pass and a training step."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def forward():
        with torch.no_grad():
            return model(x)

    def step():
        return torch.autograd.grad(model(x).square().sum(), parameters)

    return {f"{name} forward": forward, f"{name} step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="default: $SPARSEKIT_DATA")
    parser.add_argument("--run", type=Path, required=True, help="directory of the search, kept")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset, training = data.load("mnist", args.data_dir), Training(args.iterations)
    x = dataset.train_x[:64]
    init = models.build(NAME, seed=0)
    torch.manual_seed(0)
    for round_ in sk.tickets(init, 7, models.rates(NAME, RATE), run_dir=args.run, example_inputs=x[:60]):
        done = fit(round_.model, dataset, training, order)
        round_.record(test_accuracy=done.test_accuracy)
        print(f"round {round_.number}: {round_.density:.1%}, {done.test_accuracy:.2%}", flush=True)
    panels = []
    for number in range(ROUND, 8):
        _, masks, header = read_portable(round_path(args.run, number) / "trained.safetensors")
        panels += unions(masks, header["density"])

    state, masks, _ = read_portable(round_path(args.run, ROUND) / "trained.safetensors")
    trained = models.build(NAME, seed=0)
    trained.load_state_dict(state)
    grouping = sk.regroup(trained, masks, x)
    print(grouping)
    runs = {
        "unstructured": (trained, masks, init),
        "regrouped, refilled": (grouping.model, grouping.masks, grouping.permute(init)),
        "refilled": (trained, masks, init),
    }
    rows, timed = {}, thunks("dense", models.build(NAME, seed=0), x)
    for name, (weights, own, start) in runs.items():
        before = own
        if "refilled" in name:
            hidden = {layer: own[layer] for layer in HIDDEN}
            own = own | sk.refill(weights.state_dict(), hidden, "block:8x1")
        fast = sk.convert(start, own, x[:60], training=True)
        torch.manual_seed(0)
        accuracy = fit(fast, dataset, training, order).test_accuracy
        share = sum(int((own[n] & before[n]).sum()) for n in HIDDEN) / sum(int(before[n].sum()) for n in HIDDEN)
        formats = {n: m.format.name for n, m in fast.named_modules() if isinstance(m, SparseModule)}
        total = sum(int(mask.sum()) for mask in own.values()) / sum(mask.numel() for mask in own.values())
        rows[name] = {"accuracy": accuracy, "density": total, "formats": formats, "kept": share}
        print(f"{name}: {accuracy:.2%} at {total:.1%}, {share:.0%} of the survivors kept, {formats}", flush=True)
        serving = sk.convert(sk.to_dense(fast), own, x)
        timed |= {f"{name} forward": thunks("", serving, x)[" forward"], f"{name} step": thunks("", fast, x)[" step"]}
    times = measure(timed, 0.5)
    for name in rows:
        rows[name]["us"] = {kind: times[f"{name} {kind}"] for kind in ("forward", "step")}
        text = []
        for other in ("dense", "unstructured"):
            ratios = [times[f"{other} {kind}"] / times[f"{name} {kind}"] for kind in ("forward", "step")]
            text.append(f"{ratios[0]:.2f}x / {ratios[1]:.2f}x of {other}")
        print(f"{name}: forward / step {', '.join(text)}")
    if args.json:
        result = {"environment": environment(), "iterations": args.iterations, "panels": panels, "tickets": rows,
                  "dense_us": {kind: times[f"dense {kind}"] for kind in ("forward", "step")}}  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
