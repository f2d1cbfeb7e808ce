"""Never slower, never bigger: random (model, mask, batch) cases, converted against dense, every failure listed.

    python benchmarks/guarantee.py --cases 200 --out guarantee.json

A case is a network of random widths (fully connected, convolutional, residual or attention), a mask of a random
pattern and sparsity, a batch, and inference or a training step. It passes when the converted model takes at most 1.03
of the dense model's time (median of interleaved rounds; a case that fails is measured once more, longer) and its
parameters and indices at most 1.02 of the dense bytes. Dense is the model as torch runs it; its training step, forward
and backward(), is the rival although it lets pruned weights grow again. ``masked`` beside it compares with a model
that keeps them at zero as a ticket search must, multiplying weights by masks. Bytes of inference compare with the
dense parameters; of a step with these, their masks, gradients and Adam's moments (gradients and moments on both
sides); ``plain`` beside it compares parameters and indices with dense weights alone. Each case depends on its number
only: a run that was stopped goes on where it was, and ``--first`` splits one among machines.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.bench import environment
from sparsekit.plan import measure
from sparsekit.ticket.ledger import masked_dense

TIME, BYTES = 1.03, 1.02
PATTERNS = ("unstructured", "unstructured", "unstructured", "block:16x16", "block:8x1", "block:4x4", "channel", "2:4")


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Attention(nn.Module):
    """A transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def draw(number: int) -> tuple[nn.Module, torch.Tensor, dict[str, torch.Tensor], dict]:
    """Case ``number``: model, input, masks, and what was drawn."""
    dice = random.Random(number)
    torch.manual_seed(number)
    kind = dice.choice(("mlp", "mlp", "conv", "residual", "attention"))
    batch = dice.choice((1, 4, 16, 64))
    if kind == "mlp":
        widths = [dice.choice((64, 100, 256, 300, 512, 784, 1024)) for _ in range(dice.randint(2, 4))]
        pairs = zip(widths, widths[1:], strict=False)
        layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())]
        model, x = nn.Sequential(*layers, nn.Linear(widths[-1], 10)), torch.randn(batch, widths[0])
    elif kind == "attention":
        width = dice.choice((64, 128, 256))
        model, x = nn.Sequential(Attention(width), Attention(width)), torch.randn(min(batch, 16), 32, width)
    else:
        widths, side, batch = [dice.choice((16, 32, 64)) for _ in range(2)], dice.choice((8, 16, 32)), min(batch, 16)
        body = [nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU()]
        if kind == "residual":
            body += [Residual(widths[0])]
        body += [nn.Conv2d(widths[0], widths[1], dice.choice((1, 3)), stride=dice.choice((1, 2))), nn.ReLU()]
        model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[1], 10))
        x = torch.randn(batch, 3, side, side)
        if dice.random() < 0.3:
            x = x.contiguous(memory_format=torch.channels_last)
            model = model.to(memory_format=torch.channels_last)
    pattern, sparsity = dice.choice(PATTERNS), dice.choice((0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98))
    layers = sk.prunable(model)
    ends = {[*layers][0], [*layers][-1]} if pattern != "unstructured" else set()
    exclude = [name for name in ends if len(layers) > 2]
    if pattern == "2:4":
        sparsity = 0.5
        exclude = [name for name, module in layers.items() if module.weight[0].numel() % 4 or module.weight.dim() > 2]
    try:
        masks = sk.prune(model, sparsity, pattern, "random", scope="layer", exclude=exclude)
    except ValueError:  # a pattern that this model cannot have
        pattern, masks = "unstructured", sk.prune(model, sparsity, "unstructured", "random", scope="layer")
    facts = {
        "kind": kind, "pattern": pattern, "sparsity": sparsity, "input": list(x.shape), "training": dice.random() < 0.4,
        "channels_last": x.dim() == 4 and not x.is_contiguous(),
    }  # fmt: skip
    return model.eval(), x, masks, facts


def run_case(number: int, plan_seconds: float) -> dict:
    """Convert and time one case."""
    model, x, masks, facts = draw(number)
    training = facts["training"]
    fast = sk.convert(model, masks, x, training, plan_seconds=plan_seconds)
    models = {"dense": model, "converted": fast}
    if training:
        models["masked"] = masked_dense(model, masks).eval()
    passes = {name: _pass(net, x, training) for name, net in models.items()}
    for seconds in (0.15, 0.6):
        times = measure(passes, seconds)
        ratio = times["converted"] / times["dense"]
        if ratio <= TIME:
            break
    found = sk.explain(fast)
    state = 3 if training else 0  # gradient and moments of every parameter
    held = [sum(p.numel() * p.element_size() for p in net.parameters()) * state for net in (fast, model)]
    marks = sum(mask.numel() for mask in masks.values() if not bool(mask.all())) if training else 0
    share = (found.bytes + held[0]) / (found.dense_bytes + marks + held[1])
    formats = {layer.name: layer.chosen for layer in found.layers}
    return {
        "case": number, **facts, "dense_us": times["dense"], "us": times["converted"], "time": ratio, "bytes": share,
        "masked": times["converted"] / times["masked"] if training else None,
        "plain": found.bytes / found.dense_bytes, "formats": formats, "planning_seconds": found.whole.seconds,
        "failed": [what for what, bad in (("time", ratio > TIME), ("bytes", share > BYTES)) if bad],
    }  # fmt: skip


def _pass(model: nn.Module, x: torch.Tensor, training: bool):
    if not training:

        def forward():
            with torch.no_grad():
                return model(x)

        return forward
    parameters = [*model.parameters()]

    def step():
        model(x).sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan-seconds", type=float, default=2.0)
    parser.add_argument("--limit", type=float, default=1e9, help="stop after so many seconds; run again to go on")
    parser.add_argument("--again", action="store_true", help="measure the failures of an earlier run anew")
    parser.add_argument("--out", type=Path, required=True, help="JSON; cases that are in it are not run again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start, rows = time.perf_counter(), {}
    if args.out.exists():
        rows = {row["case"]: row for row in json.loads(args.out.read_text())["rows"]}
    for number in range(args.first, args.first + args.cases):
        if number in rows and not (args.again and rows[number]["failed"]):
            continue
        if time.perf_counter() - start > args.limit:
            break
        rows[number] = row = run_case(number, args.plan_seconds)
        print(_line(row), flush=True)
        _write(args.out, args.threads, rows)
    failed = [row for row in rows.values() if row["failed"]]
    gain = sorted(1 / row["time"] for row in rows.values())
    print(f"{len(rows)} cases, {len(failed)} failed; speedup {gain[0]:.2f}x to {gain[-1]:.2f}x, median "
          f"{gain[len(gain) // 2]:.2f}x" if gain else "no case")  # fmt: skip
    for row in failed:
        print(f"FAILED ({', '.join(row['failed'])}) {_line(row)}")
    return 1 if failed else 0


def _line(row: dict) -> str:
    work = "step" if row["training"] else "forward"
    size = "x".join(map(str, row["input"]))
    return (
        f"{row['case']:4d} {row['kind']:9} {row['pattern']:12} {row['sparsity']:4} {size:12} {work:7} dense "
        f"{row['dense_us']:8.0f} us, converted {row['us']:8.0f}: time {row['time']:.2f}, bytes {row['bytes']:.2f}"
    )


def _write(out: Path, threads: int, rows: dict[int, dict]) -> None:
    text = json.dumps({"environment": environment(), "threads": threads, "rows": [rows[n] for n in sorted(rows)]})
    partial = out.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(out)


if __name__ == "__main__":
    raise SystemExit(main())
