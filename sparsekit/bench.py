"""Benchmark suites: sparse layers against the strongest dense torch, interleaved in one run.

A row is printed only if the sparse output agrees with a float64 dense product. ``ratio`` is the best
dense time over the sparse time, so below 1 sparse loses. Losses are rows like any other.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__, device
from .nn import SparseConv2d, SparseLinear, SparseModule
from .plan import measure

__all__ = ["SUITES", "Case", "Row", "Setup", "environment", "run", "run_case", "set_up"]

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Case:
    """One layer at one density: ``input`` is its input's shape, ``work`` is ``forward`` or ``step``.

    ``block`` (outputs, inputs) are pruned together and run as ``bsr``; single weights run as ``csr``.
    """

    layer: str
    input: tuple[int, ...]
    density: float
    work: str
    block: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        """``linear-1024x1024-b64-d0.1-forward``, ``linear-1024x1024-b64-16x16-d0.1-forward``."""
        block = "" if self.block == (1, 1) else f"-{self.block[0]}x{self.block[1]}"
        return f"{self.layer}-b{self.input[0]}{block}-d{self.density:g}-{self.work}"


@dataclass
class Row:
    """A measured case; times are medians in us, ``gflops`` counts survivors only, ``bytes`` weight and index."""

    name: str
    density: float
    work: str
    threads: int
    sparse_us: float
    dense_us: float
    ratio: float
    rivals: dict[str, float]
    flops: int
    gflops: float
    bytes: int
    dense_bytes: int
    error: float
    notes: dict[str, str] = field(default_factory=dict)


_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear-1024x1024": (lambda: nn.Linear(1024, 1024), (64, 1024)),
    "linear-784x300": (lambda: nn.Linear(784, 300), (60, 784)),
    "linear-4096x1024": (lambda: nn.Linear(4096, 1024), (64, 4096)),
    "linear-1024x1024-one": (lambda: nn.Linear(1024, 1024), (1, 1024)),
    "conv3x3-128-28": (lambda: nn.Conv2d(128, 128, 3, padding=1), (16, 128, 28, 28)),
    "conv3x3-64-32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 64, 32, 32)),
    "conv3x3-256-14": (lambda: nn.Conv2d(256, 256, 3, padding=1), (16, 256, 14, 14)),
    "conv1x1-256-28": (lambda: nn.Conv2d(256, 256, 1), (1, 256, 28, 28)),
    "linear-8x8": (lambda: nn.Linear(8, 8), (4, 8)),
    "linear-64x64": (lambda: nn.Linear(64, 64), (16, 64)),
}
_TINY = ("linear-8x8", "linear-64x64")
SUITES: dict[str, tuple[Case, ...]] = {
    "layers": tuple(
        Case(layer, size, density, work)
        for layer, (_, size) in _LAYERS.items()
        if layer not in _TINY
        for density in DENSITIES
        for work in ("forward", "step")
    ),
    "quick": tuple(
        Case(layer, _LAYERS[layer][1], density, work)
        for layer in ("linear-1024x1024", "linear-784x300", "conv3x3-128-28")
        for density in (0.2, 0.1, 0.05)
        for work in ("forward", "step")
    ),
    "blocks": tuple(
        Case("linear-1024x1024", _LAYERS["linear-1024x1024"][1], density, work, block)
        for block in ((16, 16), (16, 1), (8, 1), (8, 8))
        for density in (0.2, 0.1, 0.05)
        for work in ("forward", "step")
    ),
    "overhead": tuple(Case(layer, _LAYERS[layer][1], 0.1, work) for layer in _TINY for work in ("forward", "step")),
}


class Setup(NamedTuple):
    """A case ready to time: ``thunks`` holds ``sparse`` and its rivals, ``notes`` why a rival is missing."""

    sparse: SparseModule
    dense: nn.Module
    x: Tensor
    error: float
    thunks: dict[str, Callable[[], object]]
    notes: dict[str, str]


def set_up(case: Case, where: str = "cpu") -> Setup:
    """Build a case; raises AssertionError when the sparse output is wrong, because then no time counts."""
    generator = torch.Generator().manual_seed(0)
    dense = _LAYERS[case.layer][0]()
    out, inputs, *kernel = dense.weight.shape
    rows, cols = case.block
    mask = torch.rand(-(-out // rows), -(-inputs // cols), *kernel, generator=generator) < case.density
    mask = mask.repeat_interleave(rows, 0)[:out].repeat_interleave(cols, 1)[:, :inputs]
    with torch.no_grad():
        dense.weight.mul_(mask)
    x = torch.randn(case.input, generator=generator).to(where)
    dense = dense.to(where)
    kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    sparse = kind.from_dense(dense, mask, "csr" if case.block == (1, 1) else "bsr")
    error = _error(sparse, dense, x)
    if not error < 1e-4:
        raise AssertionError(f"{case.name}: Expected the float64 dense result within 1e-4, got {error:.1e}; not timed")
    thunks, notes = _rivals(dense, x, case.work)
    thunks["sparse"] = _thunk(sparse, x, case.work)
    return Setup(sparse, dense, x, error, thunks, notes)


def run_case(case: Case, where: str = "cpu") -> Row:
    """Measure one case."""
    sparse, dense, x, error, thunks, notes = set_up(case, where)
    times = measure(thunks, seconds=0.4)
    sparse_us = times.pop("sparse")
    dense_us = min(us for name, us in times.items() if name.startswith("dense"))
    positions = x.shape[0]
    if x.dim() == 4:
        positions *= dense(x).shape[2:].numel()
    flops = 2 * sparse.values.numel() * positions * (3 if case.work == "step" else 1)
    plain = [p.numel() * p.element_size() for p in dense.parameters()]
    return Row(
        case.name, case.density, case.work, torch.get_num_threads(), sparse_us, dense_us, dense_us / sparse_us,
        times, flops, flops / sparse_us / 1e3, sparse.bytes(), sum(plain), error, notes,
    )  # fmt: skip


def _rivals(dense: nn.Module, x: Tensor, work: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """The dense executions torch offers, and torch.sparse where it has the operation."""
    thunks = {"dense": _thunk(dense, x, work)}
    notes = {}
    if isinstance(dense, nn.Conv2d):
        copy = nn.Conv2d(dense.in_channels, dense.out_channels, dense.kernel_size, padding=dense.padding).to(x.device)
        copy.load_state_dict(dense.state_dict())
        last = {"memory_format": torch.channels_last}
        thunks["dense channels_last"] = _thunk(copy.to(**last), x.contiguous(**last), work)
        notes["torch.sparse"] = "torch has no sparse convolution"
    elif work == "forward":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that its CSR support is beta
            weight = dense.weight.detach().to_sparse_csr()
            thunks["torch.sparse csr"] = lambda: torch.sparse.mm(weight, x.t()).t() + dense.bias.detach()
    else:
        notes["torch.sparse"] = "no backward for a CSR weight of fixed pattern"
    return thunks, notes


def _thunk(module: nn.Module, x: Tensor, work: str) -> Callable[[], object]:
    if work == "forward":

        def forward():
            with torch.no_grad():
                return module(x)

        return forward
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    wanted = [x, *module.parameters()]
    dy = torch.randn_like(module(x))
    return lambda: torch.autograd.grad(module(x), wanted, dy)


@torch.no_grad()
def _error(sparse: SparseModule, dense: nn.Module, x: Tensor) -> float:
    weight, bias = dense.weight.double(), dense.bias.double()
    if isinstance(dense, nn.Linear):
        exact = F.linear(x.double(), weight, bias)
    else:
        exact = F.conv2d(x.double(), weight, bias, padding=dense.padding)
    return float((sparse(x).double() - exact).norm() / exact.norm())


def memory() -> dict[str, float]:
    """Bytes of a 90 %-sparse 1024-1024-1024 network with Adam state, dense and converted, and their ratio."""
    from . import convert, prune

    def held(model: nn.Module) -> int:
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(8, 1024)).sum().backward()
        optimizer.step()
        state = [t for values in optimizer.state.values() for t in values.values()]
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *state]
        return sum(t.numel() * t.element_size() for t in tensors)

    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    sparse = convert(model, prune(model, 0.9), training=True, impl="csr")
    dense_bytes, sparse_bytes = held(model), held(sparse)
    return {"dense_bytes": dense_bytes, "sparse_bytes": sparse_bytes, "share": sparse_bytes / dense_bytes}


def environment(where: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge or repeat the rows."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.describe(where),
        "cpu": device.cpu()["model"],
        "caches": device.cpu()["caches"],  # tells generations apart that go by one name
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsekit": __version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }


def run(suite: str, where: str = "cpu", threads: int | None = None, out: Path | None = None) -> list[Row]:
    """Run a suite, print its table, optionally write ``{"environment", "rows"}`` as JSON; returns the rows."""
    if suite not in (*SUITES, "memory"):
        raise ValueError(f"Expected a suite of {', '.join((*SUITES, 'memory'))}, got {suite!r}")
    if where == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected --device cpu, got cuda: torch sees no CUDA device here (see sparsekit info)")
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: Expected an existing folder for the JSON file, got none")
    if threads:
        torch.set_num_threads(threads)
    facts = environment(where)
    print(f"{facts['device']}, torch {facts['torch']}, {torch.get_num_threads()} threads, commit {facts['commit']}")
    extra, rows = {}, []
    if suite == "memory":
        extra["memory"] = memory()
        print("90 % sparse, with gradient and Adam state: {share:.3f} of the dense bytes".format(**extra["memory"]))
    for line in _lines(SUITES.get(suite, ()), where, rows):
        print(line, flush=True)
    if out is not None:
        out.write_text(json.dumps({"environment": facts, "rows": [asdict(row) for row in rows], **extra}, indent=1))
    return rows


def _lines(cases: tuple[Case, ...], where: str, rows: list[Row]) -> Iterator[str]:
    if cases:
        yield f"{'case':44} {'dense us':>9} {'sparse us':>9} {'ratio':>7} {'GFLOP/s':>8} {'bytes':>6}  rivals"
    for case in cases:
        row = run_case(case, where)
        rows.append(row)
        rivals = ", ".join(f"{name} {us:.0f}" for name, us in row.rivals.items())
        yield (
            f"{row.name:44} {row.dense_us:9.1f} {row.sparse_us:9.1f} {row.ratio:6.2f}x {row.gflops:8.1f} "
            f"{row.bytes / row.dense_bytes:5.2f}x  {rivals}"
        )
