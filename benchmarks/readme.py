"""The README's tables, text and figures, from result files only.

    python benchmarks/readme.py RESULT.json --threads 2 --models MODELS.json --tickets LENET-T2.json LENET-T1.json
        --real REAL.json …

RESULT.json is what ``sparsekit bench hero --threads 2 --json RESULT.json`` wrote. Rewrites the parts of README.md
between the markers ``table``, ``losses``, ``models``, ``real`` and ``lenet`` where they are, and crossover.svg and
lenet.png in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from matplotlib.figure import Figure

from sparsekit.bench.figures import crossover
from sparsekit.bench.results import read

ROOT = Path(__file__).resolve().parent.parent
SHOWN = (
    ("linear-1024x1024-b64", "Linear 1024 → 1024, batch 64"),
    ("linear-784x300-b60", "Linear 784 → 300, batch 60"),
    ("linear-4096x1024-b64", "Linear 4096 → 1024, batch 64"),
    ("linear-1024x1024-one-b1", "Linear 1024 → 1024, batch 1"),
    ("conv3x3-128-28-b16", "Conv 3×3, 128 → 128, 28×28, batch 16"),
    ("conv3x3-64-32-b64", "Conv 3×3, 64 → 64, 32×32, batch 64"),
    ("conv1x1-256-28-b1", "Conv 1×1, 256 → 256, 28×28, batch 1"),
)
NETWORKS = (
    ("lenet-300-100-b60", "LeNet-300-100, batch 60"),
    ("vgg16-b16", "VGG-16 for CIFAR-10, batch 16"),
    ("resnet18-b1", "ResNet-18 at 224², batch 1"),
)
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)


def table(results: dict, threads: int) -> str:
    """Markdown: forward and training-step ratios per layer and sparsity."""
    rows = {row["name"]: row for row in results["rows"] if row["threads"] == threads}
    head = " | ".join(f"{1 - d:.0%}" for d in DENSITIES)
    lines = [f"| × best dense torch fp32, forward / training step | {head} |"]
    lines.append("|---|" + "---|" * len(DENSITIES))
    for key, label in SHOWN:
        cells = []
        for density in DENSITIES:
            pair = [rows[f"{key}-d{density:g}-{work}"]["ratio"] for work in ("forward", "step")]
            cells.append(" / ".join(f"{ratio:.1f}" if ratio >= 1 else f"**{ratio:.2f}**" for ratio in pair))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    facts = results["environment"]
    lines.append(
        f"\n{facts['cpu']} ({facts['device']}), {threads} threads, torch {facts['torch']}, unstructured masks, `csr` "
        f"forced, commit {facts['commit']}: medians of interleaved runs against the better of contiguous and "
        "channels_last. **Bold: sparse loses**; there `convert` keeps the layer dense."
    )
    return "\n".join(lines)


def losses(results: dict, threads: int) -> str:
    """Markdown: every row where the best dense torch is faster, worst first."""
    lost = [row for row in results["rows"] if row["threads"] == threads and row["ratio"] < 1 and row.get("p50_us")]
    lines = ["| where sparse loses | sparse us | dense us | ratio |", "|---|---|---|---|"]
    for row in sorted(lost, key=lambda row: row["ratio"]):
        cells = f"{row['p50_us']:.1f} | {row['dense_us']:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row.get('suite', '')} {row['name']} | {cells} |")
    return "\n".join(lines) if lost else "In none of the rows."


def models(results: dict) -> str:
    """Markdown: whole networks at 90 %, by which weights went, with the share of the multiply-adds that stayed."""
    rows = {row["name"]: row for row in results["rows"] if row["density"] == 0.1}
    lines = ["| whole network at 90 %, forward / training step | every layer by 90 % | ranked together | regrouped |"]
    lines.append("|---|---|---|---|")
    for key, label in NETWORKS:
        cells = []
        for masks in ("-uniform", "", "-regrouped"):
            pair = [rows.get(f"{key}{masks}-d0.1-{work}") for work in ("forward", "step")]
            text = " / ".join("–" if row is None else f"{row['ratio']:.1f}" for row in pair)
            share = re.search(r"([0-9.]+) of the multiply-adds", "" if pair[0] is None else pair[0]["notes"]["density"])
            cells.append(f"{text} ({float(share[1]):.0%} of the work)" if share and masks != "-regrouped" else text)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append(
        "\nOne thread, initial weights pruned by magnitude, against their best dense form; in brackets the share of "
        "the multiply-adds that is left. Ranked together, the first layers of a fresh network keep most of their "
        f"weights, and do most of the work. Commit {results['environment']['commit']}."
    )
    return "\n".join(lines)


def real(runs: list[dict]) -> str:
    """Markdown: tickets that searches found, against dense torch."""
    names = {"lenet-300-100": "LeNet-300-100", "vgg16": "VGG-16", "resnet18": "ResNet-18 at 32²"}
    lines = ["| ticket of a search | weights left | work left | inference | fused | step | step, of masked dense |"]
    lines.append("|---|---|---|---|---|---|---|")
    for run in runs:
        row, ranked = run["rows"]["ticket"], {"layer": "every layer ranked alone", "global": "ranked together"}
        label = names[run["model"]]
        lines.append(
            f"| {label}, batch {run['batch']}, {ranked[run['scope']]} | {run['density']:.1%} | "
            f"{run['flop_density']:.1%} | {row['forward']:.1f} | {row['fused_forward']:.1f} | "
            f"{row['step']:.1f} | {row['masked_step']:.1f} |"
        )
    commit = runs[0]["environment"]["commit"]
    lines.append(
        "\nOne thread, times dense torch's (the better layout); masked dense multiplies weight and mask in every step. "
        f"`benchmarks/real_tickets.py`, commit {commit}: of short searches, whose masks are real and accuracy low."
    )
    return "\n".join(lines)


def lenet(runs: list[dict]) -> str:
    """One paragraph on the search of LeNet-300-100 on MNIST."""
    first = runs[0]
    by_density = {round(100 * row["density"], 1): row for row in first["rounds"]}
    ticket = by_density[13.5]
    dense = first["rounds"][0]
    speeds = "; ".join(
        f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}: whole search "
        f"{run['total']['masked_wall_seconds']:.1f} s → {run['total']['wall_seconds']:.1f} s "
        f"(**{run['total']['ratio']:.2f}x**), training in rounds under 14 % **{run['total']['late_ratio']:.2f}x**"
        for run in runs
    )
    return (
        f"LeNet-300-100 on MNIST by the paper's recipe, {dense['sparse']['steps']} iterations a round, "
        f"{len(first['rounds']) - 1} rounds of 20 %, against the best masked-dense loop (`weight * mask`, fused Adam, "
        "same threads), both run in full by `benchmarks/tickets.py`, ours by the written-out step (see The laboratory) "
        f"that a masked-dense loop has not: it gains in dense rounds too. {speeds}. Accuracy at early stop: dense "
        f"{dense['sparse']['test_accuracy']:.2%}, ticket at 13.5 % of the weights "
        f"{ticket['sparse']['test_accuracy']:.2%} (masked-dense {ticket['masked']['test_accuracy']:.2%}), "
        f"the same mask re-initialised {ticket['control']['test_accuracy']:.2%}."
    )


def figure(run: dict, path: Path) -> None:
    """Accuracy, and step time sparse against masked-dense, over weights remaining."""
    rounds = run["rounds"]
    left = [100 * row["density"] for row in rounds]
    canvas = Figure(figsize=(9, 3.4), layout="constrained")
    accuracy, speed = canvas.subplots(1, 2)
    blue, sky, red = ({"color": color} for color in ("#0072B2", "#56B4E9", "#D55E00"))
    for who, style, color, label in (
        ("sparse", "o-", blue, "ticket, sparse"),
        ("masked", "s--", sky, "ticket, masked dense"),
        ("control", "^:", red, "re-initialised"),
    ):
        shown = [(100 * r["density"], 100 * r[who]["test_accuracy"]) for r in rounds if r[who]]
        accuracy.plot(*zip(*shown, strict=True), style, label=label, **color)
    accuracy.set_ylabel("test accuracy at early stop, %")
    speed.plot(left, [r["sparse"]["step_us"] for r in rounds], "o-", label="sparse", **blue)
    speed.plot(left, [r["masked"]["step_us"] for r in rounds], "s--", label="masked dense", **sky)
    speed.set_ylabel(f"training step, us ({run['threads']} threads)")
    speed.set_ylim(bottom=0)
    for axes in (accuracy, speed):
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks([100, 50, 20, 10, 7], ["100", "50", "20", "10", "7"])
        axes.minorticks_off()
        axes.set_xlabel("weights remaining, %")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help="results of sparsekit bench models")
    parser.add_argument("--tickets", type=Path, nargs="+", default=[], help="results of sparsekit bench tickets")
    parser.add_argument("--real", type=Path, nargs="+", default=[], help="results of benchmarks/real_tickets.py")
    args = parser.parse_args()
    results = read(args.results)
    parts = {"table": table(results, args.threads), "losses": losses(results, args.threads)}
    runs = [json.loads(path.read_text()) for path in args.tickets]
    if args.models:
        parts["models"] = models(read(args.models))
    if args.real:
        parts["real"] = real([json.loads(path.read_text()) for path in args.real])
    if runs:
        parts["lenet"] = lenet(runs)
        figure(runs[0], ROOT / "benchmarks/results/lenet.png")
    if svg := crossover([row for row in results["rows"] if row["threads"] == args.threads]):
        (ROOT / "benchmarks/results/crossover.svg").write_text(svg)
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, part in parts.items():
        marked = f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(marked, lambda m, part=part: m[1] + part + m[2], text, flags=re.S)
        print(f"{name}: {'rewritten' if count else f'README.md has no <!-- {name} --> part'}")
    readme.write_text(text)


if __name__ == "__main__":
    main()
