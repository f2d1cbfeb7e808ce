"""Channel-pruned ResNet-18 through compact: time against floating-point operations, and the output's error.

    python benchmarks/compaction.py --threads 1 --json out.json

Masks are of two kinds. ``joined``: channels are ranked by magnitude, and the layers that a residual sum joins
keep the same ones. ``independent``: every layer ranks its own, so sums keep the union; what is left of their dead
rows is for the ``compact`` format. Batch norms have the statistics and shifts of a network that was trained
(random ones, so that dead channels hold constants). Times are medians of interleaved runs in eval mode, the better of
contiguous and channels_last each: of the network before, compact, compact and fused (batch norms folded), and of a
dense network built with the compact one's widths.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsekit as sk
from sparsekit import models
from sparsekit.bench import environment
from sparsekit.nn.bordered import BorderedConv2d
from sparsekit.plan import measure


def channel_masks(model: nn.Module, share: float, joined: bool) -> dict[str, Tensor]:
    """Masks that keep ``1 - share`` of the rows of every convolution."""
    scores = {name: m.weight.detach().abs().flatten(1).sum(1) for name, m in sk.prunable(model, ["fc"]).items()}
    streams: dict[str, list[str]] = {}
    for name in scores:
        stage = "layer1" if name == "conv1.weight" else name.split(".")[0]
        in_stream = name == "conv1.weight" or name.endswith(("conv2.weight", "downsample.0.weight"))
        streams.setdefault(stage if joined and in_stream else name, []).append(name)
    masks = {}
    for names in streams.values():
        total = torch.stack([scores[name] for name in names]).sum(0)
        alive = total.argsort(descending=True, stable=True)[: round(len(total) * (1 - share))]
        for name in names:
            masks[name] = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
            masks[name][alive] = True
    return masks


def settle(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, scale, shift in (
                (norm.weight, 0.2, 1.0), (norm.bias, 0.3, 0.0), (norm.running_mean, 0.3, 0.0)
            ):  # fmt: skip
                tensor.data = torch.randn(tensor.shape, generator=generator) * scale + shift
    return model.eval()


def flops(model: nn.Module, x: Tensor) -> int:
    """Of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def native(small: nn.Module) -> nn.Module:
    """The dense network of a compact one's widths, as if it had been built so: what torch can reach at most."""
    small = copy.deepcopy(small)
    for module in small.modules():
        if isinstance(module, BorderedConv2d):
            del module.edge
            module.__class__ = nn.Conv2d
    return small


def thunks(name: str, model: nn.Module, x: Tensor) -> dict:
    """The model in both memory formats."""
    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        own, image = copy.deepcopy(model).to(memory_format=layout), x.contiguous(memory_format=layout)

        def run(own=own, image=image):
            with torch.no_grad():
                return own(image)

        found[f"{name}, {str(layout).removeprefix('torch.')}"] = run
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each candidate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.side, args.side)
    model = settle(models.build("resnet18", seed=0, input_shape=(3, args.side, args.side)))
    rows = []
    for kind in ("joined", "independent"):
        masks = channel_masks(model, args.sparsity, kind == "joined")
        cut = sk.compact(model, masks, x, inference=True)
        with torch.no_grad():
            wanted = cut.original.double()(x.double())
            error = float((cut.model(x) - wanted).norm() / wanted.norm())
        cut.original.float()
        nets = {"dense": model, "compact": cut.model, "fused": sk.fuse(cut.model), "native": native(cut.model)}
        named = [thunks(name, net, x) for name, net in nets.items()]
        times = measure({name: thunk for each in named for name, thunk in each.items()}, args.seconds)
        best = {name: min(us for key, us in times.items() if key.startswith(f"{name},")) for name in nets}
        work = flops(model, x) / flops(nets["native"], x)
        count = [sum(p.numel() for p in m.parameters()) for m in (model, cut.model)]
        ratio = {name: best["dense"] / us for name, us in best.items()}
        rows.append({"masks": kind, "flop_ratio": work, "time_ratio": ratio, "error": error, "note": cut.note,
                     "parameters": count, "us": times})  # fmt: skip
        print(f"{kind}: {work:.2f}x fewer operations, {count[0] / count[1]:.1f}x fewer parameters, error {error:.1e}; "
              f"dense {best['dense'] / 1e3:.2f} ms; {cut.note}")  # fmt: skip
        for name in ("compact", "fused", "native"):
            share = f"{ratio[name] / work:.2f} of the ratio of operations"
            print(f"  {name:8s} {best[name] / 1e3:6.2f} ms {ratio[name]:6.2f}x, {share}", flush=True)
    if args.json:
        asked = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"environment": environment(), "asked": asked, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
