"""Accuracy against measured speed-up: what each pattern of survivors costs and what it buys, on this device.

    SPARSEKIT_DATA=DIR python benchmarks/patterns.py train --seeds 3 --runs runs/patterns     # goes on where it stopped
    SPARSEKIT_DATA=DIR python benchmarks/patterns.py measure --runs runs/patterns --json OUT.json
    python benchmarks/patterns.py draw --json OUT.json --figure OUT.png

An MLP 784-1024-1024-10 on MNIST (Adam 1.2e-3, batch 60, 2000 iterations a round), pruned by magnitude to 45, 20, 10,
5 and 2 % of its hidden weights in rounds that rewind to the start, one search per pattern; groups are ranked per
layer and the output layer stays dense. 2:4 has one density, a half. Accuracy is that at early stop, the mean over
the seeds. Speed is that of the first seed's tickets as ``convert`` runs them (a channel ticket after ``compact``),
against the dense network, both eager: a forward pass and a whole training step with fused Adam, batch 60,
interleaved medians. ``work`` is the share of the network's multiply-adds that is left once units that nothing
reads or feeds are cut away.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import time
from pathlib import Path

import torch

import sparsekit as sk
from sparsekit import data, models
from sparsekit.bench import environment
from sparsekit.export.packed import read_portable
from sparsekit.figures import STYLE
from sparsekit.files import read_json, write_json
from sparsekit.flops import flop_density
from sparsekit.plan import measure
from sparsekit.ticket.store import finished_rounds, round_path
from sparsekit.ticket.train import Training, make_step, train_round

MODEL, BATCH = "mlp:784-1024-1024-10", 60
PATTERNS = ("unstructured", "block:8x1", "block:16x1", "block:4x4", "block:8x8", "block:16x16", "2:4", "channel")
LEFT = (1.0, 0.45, 0.2, 0.1, 0.05, 0.02)
TRAINING = Training(2000, BATCH, eval_every=200)


def folder(runs: Path, pattern: str, seed: int) -> Path:
    return runs / pattern.replace(":", "-") / f"seed_{seed}"


def train(runs: Path, seeds: int, patterns: list[str], seconds: float) -> None:
    """One search per pattern and seed; stops between rounds once ``seconds`` have passed."""
    begun = time.monotonic()
    for seed in range(seeds):
        dataset = data.load("mnist", seed=seed)
        model = models.build(MODEL, seed=seed)
        for pattern in patterns:
            rates = [1 - after / before for before, after in zip(LEFT, LEFT[1:], strict=False)]
            torch.manual_seed(seed)
            search = sk.tickets(
                model, rate=rates if pattern != "2:4" else [0.5], pattern=pattern, exclude="fc3.weight",
                run_dir=folder(runs, pattern, seed), example_inputs=dataset.train_x[:BATCH],
                note={"model": MODEL, "data": "mnist", "seed": seed, "training": str(TRAINING)},
            )  # fmt: skip
            borrow(folder(runs, patterns[0], seed), folder(runs, pattern, seed), search.config)
            for round_ in search:
                if time.monotonic() - begun > seconds:
                    return
                fit = train_round(round_, dataset, TRAINING)
                print(f"{pattern} seed {seed}: {100 * round_.density:.1f} % left, {100 * fit.test_accuracy:.2f} %")
    print("all trained")


def borrow(done: Path, run: Path, config: dict) -> None:
    """The dense round knows nothing of patterns: a new run begins with that of the first one."""
    if run.exists() or not round_path(done, 0).exists():
        return
    run.mkdir(parents=True)
    shutil.copy(done / "start.safetensors", run)
    shutil.copytree(round_path(done, 0), round_path(run, 0))
    write_json(run / "config.json", config)


def measured(model, masks, pattern: str, x, y) -> dict:
    """Times in us of a forward pass and of a training step, dense and of the ticket, and the work that is left."""
    cut = sk.compact(model, masks, x) if masks else None
    positions = {name: 1 for name, _ in model.named_parameters() if name.endswith("weight")}
    left = flop_density({**ones(cut.model), **cut.masks}, positions) if cut else 1.0
    whole = sum(p.numel() for name, p in model.named_parameters() if name in positions)
    small = sum(p.numel() for name, p in (cut.model if cut else model).named_parameters() if name in positions)
    source = (cut.model, cut.masks) if cut and pattern == "channel" else (model, masks)
    serving, training = (sk.convert(*source, x, flag) if masks else copy.deepcopy(model) for flag in (False, True))
    twins = {"dense": copy.deepcopy(model), "ticket": training}
    steps = {name: make_step(twin.train(), Training(1).make_optimizer(twin)) for name, twin in twins.items()}
    forwards = {"dense": copy.deepcopy(model).eval(), "ticket": serving.eval()}

    def forward(net):
        def run():
            with torch.no_grad():
                return net(x)

        return run

    infer = measure({name: forward(net) for name, net in forwards.items()}, 0.25)
    step = measure({name: lambda step=step: step(x, y) for name, step in steps.items()}, 0.25)
    return {
        "work": left * small / whole, "forward_us": infer, "step_us": step,
        "forward": infer["dense"] / infer["ticket"], "step": step["dense"] / step["ticket"],
        "formats": {layer.name: layer.chosen for layer in sk.explain(training).layers},
    }  # fmt: skip


def ones(model) -> dict:
    named = model.named_parameters()
    return {name: torch.ones_like(p, dtype=torch.bool) for name, p in named if name.endswith("weight")}


def measure_all(runs: Path, out: Path, patterns: list[str], seconds: float, note: str) -> None:
    """A row for every pattern and density, kept as it is measured; rows that are there are not measured again."""
    begun = time.monotonic()
    dataset = data.load("mnist", seed=0)
    x, y = dataset.test_x[:BATCH], dataset.test_y[:BATCH]
    found = read_json(out) if out.exists() else {"rows": []}
    there = {(row["pattern"], row["round"]) for row in found["rows"]}
    for pattern in patterns:
        seeds = sorted(folder(runs, pattern, 0).parent.glob("seed_*"))
        for number in finished_rounds(seeds[0])[1:] if seeds else []:
            if (pattern, number) in there or (number == 1 and pattern != "2:4"):  # 45 % is only on the way
                continue
            if time.monotonic() - begun > seconds:
                return
            results = [read_json(round_path(seed, number) / "result.json") for seed in seeds]
            dense = [read_json(round_path(seed, 0) / "result.json")["test_accuracy"] for seed in seeds]
            model = models.build(MODEL, seed=0)
            state, masks, _ = read_portable(round_path(seeds[0], number) / "trained.safetensors")
            model.load_state_dict(state)
            accuracies = [result["test_accuracy"] for result in results]
            row = {
                "pattern": pattern, "round": number, "density": results[0]["density"], "seeds": len(seeds),
                "accuracy": statistics.fmean(accuracies), "accuracies": accuracies,
                "dense_accuracy": statistics.fmean(dense),
                "flop_density": results[0]["flop_density"],
            }  # fmt: skip
            row |= measured(model, masks, pattern, x, y)
            found["rows"].append(row)
            facts = {"environment": environment(), "threads": torch.get_num_threads(), "model": MODEL, "batch": BATCH}
            facts["note"] = note
            write_json(out, facts | {"training": str(TRAINING), "rows": found["rows"]})
            print(
                f"{pattern:12} {100 * row['density']:5.1f} %  accuracy {100 * row['accuracy']:.2f} % (dense "
                f"{100 * row['dense_accuracy']:.2f})  forward {row['forward']:.2f}x  step {row['step']:.2f}x",
                flush=True,
            )


def draw(source: Path, figure: Path) -> None:
    """Accuracy against speed-up, a line per pattern; and the table on the terminal."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update(STYLE)
    found = json.loads(source.read_text())
    rows, drawn = found["rows"], plt.figure(figsize=(11, 4.8))
    for place, (key, title) in enumerate((("forward", "forward pass"), ("step", "training step")), 1):
        axes = drawn.add_subplot(1, 2, place)
        axes.axhline(100 * rows[0]["dense_accuracy"], color="#8C8C8C", linewidth=1.2, linestyle="--", label="dense")
        for number, pattern in enumerate(PATTERNS):
            own = [row for row in rows if row["pattern"] == pattern]
            if not own:
                continue
            style = {"color": f"C{number}", "marker": "osD^vP*X"[number]}
            axes.plot([r[key] for r in own], [100 * r["accuracy"] for r in own], label=pattern, **style)
            if place == 1:
                for row in own:
                    at = (row[key], 100 * row["accuracy"])
                    axes.annotate(f"{100 * row['density']:.0f}", at, (3, 3), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", xlabel=f"times as fast as dense, {title}", title=title)
        ticks = [0.5, 1, 2, 4, 8, 16, 32]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    drawn.axes[0].set_ylabel("test accuracy (%)")
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    drawn.savefig(figure)
    print("| pattern | weights % | work % | accuracy % (spread over seeds) | forward | training step | formats |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = (100 * end(row["accuracies"]) for end in (min, max))
        print(
            f"| {row['pattern']} | {100 * row['density']:.1f} | {100 * row['work']:.1f} | {100 * row['accuracy']:.2f} "
            f"({low:.2f} to {high:.2f}) | {row['forward']:.2f}x | {row['step']:.2f}x "
            f"| {', '.join(row['formats'].values())} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "measure", "draw"))
    parser.add_argument("--runs", type=Path, default=Path("runs/patterns"))
    parser.add_argument("--json", type=Path, default=Path("runs/patterns/patterns.json"))
    parser.add_argument("--figure", type=Path, default=Path("runs/patterns/patterns.png"))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; the next call goes on")
    parser.add_argument("--note", default="", help="kept in the file: what else ran on the machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "train":
        train(args.runs, args.seeds, args.patterns.split(","), args.seconds)
    elif args.what == "measure":
        measure_all(args.runs, args.json, args.patterns.split(","), args.seconds, args.note)
    else:
        draw(args.json, args.figure)


if __name__ == "__main__":
    main()
