"""The whole search, sparse against masked-dense, both really run: LeNet-300-100 on MNIST by the paper's recipe.

    sparsekit bench tickets --threads 2 --json out.json         # --quick: on digits, which need no download

Frankle & Carbin (arXiv:1803.03635): Gaussian Glorot, Adam 1.2e-3, batch 60, 20 % per round and 10 % in
the output layer, layerwise, reset to init. The rival is the best masked loop torch allows: weight * mask
in the forward pass, fused Adam, the same data order, evaluations and threads; its round without masks steps
as ours does, written out. The two searches alternate every hundred steps, so drift of the machine hits both.
Wall clock counts everything: training, evaluation, pruning, planning, saving.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from .. import data, models, tickets
from ..prune import prune_step
from ..ticket.ledger import masked_dense
from ..ticket.train import Training, fit, fitting
from .facts import environment

__all__ = ["main", "run"]

QUICK = {"dataset": "digits", "model": "mlp:64-300-100-10", "rounds": 4, "iterations": 200}


class MaskedSearch:
    """Iterative magnitude pruning as every other tool does it: dense weights, multiplied by masks."""

    def __init__(self, model, rate) -> None:
        self.init, self.rate, self.masks, self.trained = copy.deepcopy(model), rate, {}, None

    def open(self) -> torch.nn.Module:
        """Prune and rewind; the model to train."""
        if self.trained is not None:
            self.masks = prune_step(self.trained, self.masks, self.rate, scope="layer")
        twin = masked_dense(self.init, self.masks)
        with torch.no_grad():
            for name, mask in self.masks.items():
                twin.get_parameter(name).mul_(mask)
        return twin

    def close(self, twin: torch.nn.Module) -> None:
        """Keep what was trained."""
        self.trained = copy.deepcopy(self.init)
        self.trained.load_state_dict(twin.state_dict())


def alternate(*runs):
    """Advance the fits in turn, an evaluation each; their results and wall-clock seconds."""
    results, seconds = [None] * len(runs), [0.0] * len(runs)
    while None in results:
        for i, run in enumerate(runs):
            if results[i] is None:
                start = time.perf_counter()
                try:
                    next(run)
                except StopIteration as end:
                    results[i] = end.value
                seconds[i] += time.perf_counter() - start
    return results, seconds


def main() -> None:
    """The command line of benchmarks/tickets.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="default: $SPARSEKIT_DATA")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    search(args.data_dir, args.rounds, args.iterations, args.seed, args.json)


def run(level: str = "usual", threads: int | None = None, out: Path | None = None) -> dict:
    """The suite ``tickets``: MNIST from $SPARSEKIT_DATA, or digits at level quick; returns what it writes."""
    if threads:
        torch.set_num_threads(threads)
    return search(None, seed=0, out=out, **QUICK) if level == "quick" else search(None, 12, 2000, 0, out)


def search(
    data_dir: Path | None, rounds: int, iterations: int, seed: int, out: Path | None, dataset: str = "mnist",
    model: str = "lenet-300-100",
) -> dict:  # fmt: skip
    """Search twice, in turn; prints a line a round, writes JSON to ``out``."""
    name, threads = model, torch.get_num_threads()
    dataset = data.load(dataset, data_dir)
    model = models.build(name, seed=seed, input_shape=tuple(dataset.train_x.shape[1:]))
    training = Training(iterations)
    rate = models.rates(name)
    torch.manual_seed(seed)
    masked = MaskedSearch(model, rate)
    warm = copy.deepcopy(model)  # the first optimizer of a process imports half of torch; neither side pays for it
    fit(warm, dataset, Training(20), lambda count, epoch: torch.arange(count))
    rows = []
    with tempfile.TemporaryDirectory() as run_dir, tempfile.TemporaryDirectory() as cache:
        os.environ["SPARSEKIT_CACHE"] = cache  # planning is measured anew, and counted
        search = tickets(
            model, rounds, rate, rewind="init", run_dir=Path(run_dir) / "run",
            example_inputs=dataset.train_x[: training.batch_size],
        )  # fmt: skip
        other = masked_seconds = 0.0  # other: what passes inside our clock and is not ours
        start = time.perf_counter()
        for round_ in search:
            now = time.perf_counter()
            twin = masked.open()
            masked_seconds += time.perf_counter() - now
            (ours, theirs), (_, seconds) = alternate(
                fitting(round_.model, dataset, training, round_.permutation, round_.begin, round_.step),
                fitting(twin, dataset, training, round_.permutation),
            )
            masked_seconds += seconds
            closing = time.perf_counter()
            masked.close(twin)
            masked_seconds += time.perf_counter() - closing
            theirs = asdict(theirs)
            round_.record(**asdict(ours), masked_dense_seconds=theirs["train_seconds"])
            control = None
            if round_.masks:
                fresh = models.build(
                    name, seed=seed + 1000 + round_.number, input_shape=tuple(dataset.train_x.shape[1:])
                )
                control = asdict(fit(round_.variant(fresh), dataset, training, round_.permutation))
            other += time.perf_counter() - now - ours.train_seconds - ours.eval_seconds
            rows.append(
                {
                    "round": round_.number, "density": round_.density, "sparse": asdict(ours), "masked": theirs,
                    "control": control, "step_ratio": theirs["train_seconds"] / ours.train_seconds,
                }
            )  # fmt: skip
            reinit = f"{100 * control['test_accuracy']:.2f}" if control else "-"
            print(
                f"round {round_.number:2d}  {100 * round_.density:5.1f} %  accuracy {100 * ours.test_accuracy:.2f} "
                f"(masked {100 * theirs['test_accuracy']:.2f}, re-init {reinit})  step {ours.step_us:.0f} us "
                f"(masked {theirs['step_us']:.0f} us)  {rows[-1]['step_ratio']:.2f}x",
                flush=True,
            )
        wall = time.perf_counter() - start - other
    late = [row for row in rows if row["density"] < 0.14]
    ours, theirs = (sum(row[who]["train_seconds"] for row in late) for who in ("sparse", "masked"))
    total = {
        "wall_seconds": wall,
        "masked_wall_seconds": masked_seconds,
        "ratio": masked_seconds / wall,
        "late_ratio": theirs / ours if late else None,
    }
    print(
        f"whole search {wall:.1f} s, masked dense {masked_seconds:.1f} s: {total['ratio']:.2f}x; "
        f"training in rounds under 14 %: {total['late_ratio'] or float('nan'):.2f}x ({threads} threads)"
    )
    result = {"environment": environment(), "threads": threads, "rounds": rows, "total": total}
    if out:
        out.write_text(json.dumps(result, indent=1))
    return result
