"""Replicates trained together against one after the other: LeNet-300-100, batch 60, Adam, whole training steps.

``python benchmarks/replicates.py [--count 20] [--threads 2] [--json OUT]`` prints one row per density and kind of
batch (one for all replicates, or one each): microseconds per replicate and step, medians of interleaved rounds. One
after the other by torch's loop (``torch_us``) and as a search steps (``alone_us``); together as ``fit_together`` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekit import convert, device, models, prune
from sparsekit.nn import streamline
from sparsekit.nn.stack import Stack
from sparsekit.ticket.replicates import crews, stack_step
from sparsekit.ticket.train import Training, make_step, torch_step

BATCH, ROUNDS = 60, 15


def row(count: int, density: float, shared: bool) -> dict:
    """Median microseconds of a step per replicate, alone and together."""
    alone = [models.build("lenet-300-100", seed=seed) for seed in range(count)]
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    if density < 1:
        masks = [prune(model, 1 - density, scope="layer") for model in alone]
        alone = [convert(m, mask, x, training=True, impl="csr") for m, mask in zip(alone, masks, strict=True)]
    torchs = [torch_step(model.train(), _optimizer(model)) for model in copy.deepcopy(alone)]
    together = [_crew(copy.deepcopy(alone[crew.start : crew.stop]), x, y, shared) for crew in crews(alone)]
    for model in alone:
        streamline(model.train())
    steps = [make_step(model, _optimizer(model)) for model in alone]
    ways = {
        "torch": [(step, x, y) for step in torchs], "alone": [(step, x, y) for step in steps], "together": together,
    }  # fmt: skip
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 2):
        for way, calls in ways.items():
            start = time.perf_counter()
            for step, inputs, targets in calls:
                step(inputs, targets)
            if number >= 2:
                times[way].append((time.perf_counter() - start) / count * 1e6)
    torch_us, alone_us, together_us = (statistics.median(samples) for samples in times.values())
    return {
        "replicates": count, "density": density, "batch": "shared" if shared else "own",
        "threads": torch.get_num_threads(),
        "torch_us": round(torch_us, 1), "alone_us": round(alone_us, 1), "together_us": round(together_us, 1),
        "to_torch": round(torch_us / together_us, 2), "ratio": round(alone_us / together_us, 2),
    }  # fmt: skip


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return Training(1).make_optimizer(model)


def _crew(models: list[nn.Module], x: Tensor, y: Tensor, shared: bool) -> tuple:
    """A step of models as one, its batch and labels."""
    if len(models) == 1:
        streamline(models[0].train())
        return make_step(models[0], _optimizer(models[0])), x, y
    stack, count = Stack(models, x, shared).train(), len(models)
    images = x if shared else x.expand(count, *x.shape).contiguous()
    return stack_step(stack, _optimizer(stack)), images, y.expand(count, -1)


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
