"""Replicates trained together against one after the other: LeNet-300-100, batch 60, Adam, whole training steps.

``python benchmarks/replicates.py [--count 20] [--threads 2] [--json OUT]`` prints one row per density and kind of
batch (one for all replicates, or one each): microseconds per replicate and step, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch

from sparsekit import convert, device, models, prune
from sparsekit.nn.stack import Stack
from sparsekit.ticket.replicates import stack_step
from sparsekit.ticket.train import Training, make_step

BATCH, ROUNDS = 60, 15


def row(count: int, density: float, shared: bool) -> dict:
    """Median microseconds of a step per replicate, alone and together."""
    alone = [models.build("lenet-300-100", seed=seed) for seed in range(count)]
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    if density < 1:
        masks = [prune(model, 1 - density, scope="layer") for model in alone]
        alone = [convert(m, mask, example_inputs=x, training=True) for m, mask in zip(alone, masks, strict=True)]
    stack = Stack(copy.deepcopy(alone), x, shared).train()
    images, labels = x if shared else x.expand(count, *x.shape).contiguous(), y.expand(count, -1)
    steps = [make_step(model.train(), Training(1).make_optimizer(model)) for model in alone]

    def one_by_one():
        for step in steps:
            step(x, y)

    step_all = stack_step(stack, Training(1).make_optimizer(stack))

    def together():
        step_all(images, labels)

    times: dict = {one_by_one: [], together: []}
    for number in range(ROUNDS + 2):
        for run, samples in times.items():
            start = time.perf_counter()
            run()
            if number >= 2:
                samples.append((time.perf_counter() - start) / count * 1e6)
    alone_us, together_us = (statistics.median(samples) for samples in times.values())
    return {
        "replicates": count, "density": density, "batch": "shared" if shared else "own",
        "threads": torch.get_num_threads(),
        "alone_us": round(alone_us, 1), "together_us": round(together_us, 1), "ratio": round(alone_us / together_us, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for density in (1.0, 0.51, 0.21, 0.13, 0.036):
        for shared in (True, False):
            rows.append(row(args.count, density, shared))
            print(rows[-1])
    if args.json:
        head = {"device": device.describe("cpu"), "torch": torch.__version__}
        args.json.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
