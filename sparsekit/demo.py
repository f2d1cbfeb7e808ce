"""``make demo``: find a ticket on real digits, export it, reload it, and time it against the dense network.

    python -m sparsekit.demo --out runs/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from . import data as datasets
from . import load, models
from .__main__ import main as cli
from .export import export_file
from .files import read_json, write_json
from .plan import explain, measure
from .report import write_report

_SEARCHES = {
    "mlp": ("mlp:64-1024-1024-10", ["--rounds", "10", "--rate", "0.3", "--iterations", "300"], 64),
    "conv": ("digits-conv", ["--rounds", "6", "--rate", "0.4", "--iterations", "300"], 64),
}


def main(argv: list[str] | None = None) -> int:
    """Run both searches under ``--out`` and write ``report.md``; a finished search is not run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    out = parser.parse_args(argv).out
    parts = []
    for name, (model, how, batch) in _SEARCHES.items():
        run = out / name
        print(f"\n== {model} on handwritten digits ==", flush=True)
        code = cli(["ticket", "--model", model, "--data", "digits", *how, "--out", str(run)])
        if code:
            return code
        _serve(run, model, batch)
        text = write_report(run).read_text()
        parts.append(text.replace("](figures/", f"]({name}/figures/"))
    (out / "report.md").write_text("\n\n".join(parts))
    print(f"\nreport: {out / 'report.md'}")
    return 0


def _serve(run: Path, name: str, batch: int) -> None:
    """Export the last ticket, load it into a fresh network and time inference; the figures join the summary."""
    packed, dense = run / "ticket.safetensors", run / "dense.safetensors"
    export_file(run, "packed", packed)
    export_file(run, "dense", dense)
    data = datasets.load("digits")
    plain = models.build(name, classes=data.classes, input_shape=tuple(data.train_x.shape[1:])).eval()
    x = data.test_x[:batch]
    sparse = load(packed, plain, example_inputs=x).eval()
    _load_dense(plain, dense)
    with torch.no_grad():
        gap = float((sparse(x) - plain(x)).abs().max())
        times = measure({"dense": lambda: plain(x), "sparse": lambda: sparse(x)}, seconds=0.5)
    print(explain(sparse))
    sizes = [file.stat().st_size / 1024 for file in (packed, dense)]
    print(
        f"reloaded from {packed} ({sizes[0]:.0f} KiB, dense {sizes[1]:.0f} KiB); "
        f"largest difference to dense {gap:.1e}\n"
        f"inference, batch {len(x)}: dense {times['dense']:.0f} us, sparse {times['sparse']:.0f} us, "
        f"{times['dense'] / times['sparse']:.2f}x"
    )
    summary = read_json(run / "summary.json")
    summary["inference"] = {
        "dense_us": times["dense"],
        "sparse_us": times["sparse"],
        "speedup": times["dense"] / times["sparse"],
        "batch": len(x),
        "file_bytes": packed.stat().st_size,
        "dense_bytes": dense.stat().st_size,
    }
    write_json(run / "summary.json", summary)


def _load_dense(model: nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(file))


if __name__ == "__main__":
    raise SystemExit(main())
