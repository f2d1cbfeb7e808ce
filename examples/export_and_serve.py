"""A ticket written to a file, read by a process that knows only the architecture, and served.

    python examples/export_and_serve.py        # seconds
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sparsekit as sk
from sparsekit import models


def architecture():
    """What both sides share; weights come from the file."""
    return models.build("mlp:784-1024-1024-10", seed=0)


def write(folder: Path) -> None:
    """Prune, save packed and dense, and one batch with the answers expected of it."""
    model = architecture().eval()
    masks = sk.prune(model, sparsity=0.95, exclude=["fc3"])
    ticket = sk.convert(model, masks, example_inputs=torch.randn(16, 784))
    sk.save(ticket, folder / "ticket.safetensors")
    dense = sk.to_dense(ticket)
    save_file(dense.state_dict(), folder / "dense.safetensors")
    x = torch.randn(16, 1, 28, 28)
    with torch.no_grad():
        save_file({"x": x, "y": dense(x)}, folder / "batch.safetensors")
    sizes = {name: (folder / name).stat().st_size // 1024 for name in ("ticket.safetensors", "dense.safetensors")}
    print(f"written, KiB: {sizes}")


def serve(folder: Path) -> None:
    """What a server does: load, fuse activations into the products, answer."""
    batch = load_file(folder / "batch.safetensors")
    model = sk.load(folder / "ticket.safetensors", architecture(), example_inputs=batch["x"]).eval()
    model = sk.fuse(model)
    with torch.inference_mode():
        answer = model(batch["x"])
        torch.testing.assert_close(answer, batch["y"], rtol=1e-4, atol=1e-4)
        start = time.perf_counter()
        for _ in range(100):
            model(batch["x"])
        seconds = (time.perf_counter() - start) / 100
    print(f"served: answers agree with the dense model, {seconds * 1e6:.0f} us a batch of {len(answer)}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=Path, help="only serve what lies in this folder")
    folder = parser.parse_args().serve
    if folder:
        serve(folder)
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        write(Path(made))
        subprocess.run([sys.executable, __file__, "--serve", made], check=True)


if __name__ == "__main__":
    main()
