"""Random layers on the CPU's kernels against dense float64 products, element by element: one seed, one case.

    python tests/random_kernels.py --cases 10000            # on every instruction set in turn: make nightly
    python tests/random_kernels.py --case 1234              # one case again, in this process

A case is a linear layer or a convolution in ``csr`` or ``bsr``: any shape, mask, layout of input and gradient,
dtype, padding mode, set of wanted gradients, number of threads. Its outputs and gradients must lie within the
rounding errors that the number of terms allows, and be the same bits for any number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from sparsekit.nn import SparseConv2d, SparseLinear

DTYPES = (torch.float32,) * 5 + (torch.float64, torch.bfloat16, torch.bfloat16, torch.float16)
BLOCKS = ((8, 1), (16, 1), (1, 16), (4, 4), (8, 8), (16, 16), (4, 1), (32, 8))
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
LAYOUTS = {
    "plain": lambda t: t,
    "last first": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),  # feature-major, channels_last
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "slice": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "odd address": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    "expanded": lambda t: t[:1].expand(t.shape) if len(t) else t,
}
# Rounding of a stored result, and of a term where sums are kept. AVX512-BF16 flushes subnormal numbers.
ROUNDING = {torch.float64: (2e-16, 2e-16), torch.float32: (1.2e-7, 1.2e-7), torch.bfloat16: (8e-3, 1.2e-7),
            torch.float16: (1e-3, 1.2e-7)}  # fmt: skip
SMALLEST = {torch.float16: 1e-7}


@dataclass
class Case:
    """What a seed stands for. ``kind`` is linear or conv, ``wanted`` the gradients: x, values, bias."""

    seed: int
    kind: str
    format: str
    dtype: torch.dtype
    batch: int
    out: int
    inputs: int
    groups: int
    mask: str
    density: float
    block: tuple[int, int]
    bias: bool
    x_layout: str
    dy_layout: str
    activation: str
    wanted: tuple[bool, bool, bool]
    threads: int
    conv: dict = field(default_factory=dict)
    size: tuple[int, ...] = ()


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = Random(seed)
    kind, format = r.choice(("linear", "linear", "conv")), r.choice(("csr", "csr", "bsr"))
    linear = kind == "linear"
    # A few large ones: only those are cut among threads, tiled, or worth machine code.
    large = r.random() < (0.2 if linear else 0.05)
    groups = 1 if linear or format == "bsr" or r.random() < 0.6 else r.choice((2, 3))
    if linear:
        batch = r.choice((0, 1, 1, 2, 7, 8, 15, 16, 17, 33, 64, 65, r.randint(1, 200)))
        out, inputs = (r.randint(200, 500), r.randint(200, 900)) if large else (r.randint(1, 90), r.randint(1, 130))
        conv, size = {}, ()
    else:
        batch = r.choice((0, 1, 1, 2, 3, 8, 16, 17))
        out, inputs = (groups * r.choice((1, r.randint(1, 40 if large else 12))) for _ in range(2))
        kernel = r.choice(((1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (r.randint(1, 5), r.randint(1, 5))))
        dilation = r.choice(((1, 1), (1, 1), (r.randint(1, 3), r.randint(1, 3))))
        mode = r.choice(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple(r.randint(0, reached // 2 + (mode == "zeros")) for reached in reach)
        stride = r.choice(((1, 1), (1, 1), (2, 2), (r.randint(1, 3), r.randint(1, 3))))
        least = (max(1 + p, reached + 1 - 2 * p) for reached, p in zip(reach, padding, strict=True))
        size = tuple(low + r.randint(0, 24 if large else 9) for low in least)
        conv = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation,
                "groups": groups, "padding_mode": mode}  # fmt: skip
    wanted = r.choice([(True, True, True)] * 4 + [(a, b, not (a or b)) for a in (True, False) for b in (True, False)])
    return Case(
        seed, kind, format, r.choice(DTYPES), batch, out, inputs, groups,
        r.choice(("even", "even", "even", "dead rows", "dead columns", "one full row")),
        r.choice((0.0, 1.0, 0.02, 0.1, 0.3, r.random())), r.choice(BLOCKS) if format == "bsr" else (1, 1),
        r.random() < 0.7, r.choice(list(LAYOUTS)), r.choice(list(LAYOUTS)), r.choice(list(ACTIVATIONS)), wanted,
        r.choice((1, 1, 2, 3)), conv, size,
    )  # fmt: skip


def make_mask(case: Case, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A bool mask of whole blocks."""
    (rows, cols), (out, inputs, *kernel) = case.block, shape
    mask = torch.rand(-(-out // rows), -(-inputs // cols), *kernel, generator=generator) < case.density
    if case.mask == "dead rows":
        mask[::2] = False
    elif case.mask == "dead columns":
        mask[:, 1::2] = False
    elif case.mask == "one full row":
        mask[len(mask) // 2] = True
    return mask.repeat_interleave(rows, 0)[:out].repeat_interleave(cols, 1)[:, :inputs]


def close(what: str, got: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor, terms: int, slack=1.0, floor=0.0):
    """Every element within rounding: of the result once, of each of ``terms`` products summing to ``scale`` at most."""
    assert got.shape == exact.shape, f"{what}: Expected shape {list(exact.shape)}, got {list(got.shape)}"
    stored, summed = ROUNDING[got.dtype]
    bound = slack * (stored + (terms + 4) * summed) * scale + SMALLEST.get(got.dtype, 1e-30) + floor
    wrong = ~((got.double() - exact).abs() <= bound)  # NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what}{list(at)}: Expected {exact[at]:.9g} within {bound[at]:.1e}, got {got[at]:.9g}")


def check(case: Case) -> None:
    """Run one case; raises AssertionError that says which element of which result is wrong."""
    generator = torch.Generator().manual_seed(case.seed)
    if case.kind == "linear":
        dense, kind, size = nn.Linear(case.inputs, case.out, case.bias), SparseLinear, ()
    else:
        dense, kind, size = nn.Conv2d(case.inputs, case.out, **case.conv, bias=case.bias), SparseConv2d, case.size
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        mask = make_mask(case, dense.weight.shape, generator)
        dense.weight.mul_(mask)
    dense = dense.to(case.dtype)
    layer = kind.from_dense(dense, mask, case.format)
    oracle = dense.double()
    x = torch.randn(case.batch, case.inputs, *size, generator=generator).to(case.dtype)
    x = LAYOUTS[case.x_layout](x)
    x64 = x.double().requires_grad_()
    y64 = oracle(x64)
    dy = LAYOUTS[case.dy_layout](torch.randn(y64.shape, generator=generator).to(case.dtype))
    dx64, dw64, *db64 = torch.autograd.grad(y64, (x64, *oracle.parameters()), dy.double())

    # The same sums of magnitudes: what rounding errors are relative to.
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.abs_()
    ax = x.double().abs().requires_grad_()
    magnitude = oracle(ax)
    adx, adw, *adb = torch.autograd.grad(magnitude, (ax, *oracle.parameters()), dy.double().abs())
    magnitude = magnitude.detach()

    taps = dense.weight[0, 0].numel()
    positions = y64.numel() // max(y64.shape[1], 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in dict.fromkeys((case.threads, 1)):
            torch.set_num_threads(threads)
            results.append(_run(case, layer, x, dy, y64))
    finally:
        torch.set_num_threads(before)
    # Where a format has no kernel of its own torch's runs: near enough, and its bits are not ours to promise.
    ours = layer.format.absent(torch.device("cpu"), mask, case.groups) is None
    slack = 1 if ours else 4
    got = results[0]
    promised = set(got) if ours else set()
    if case.activation not in ("none", *layer.format.epilogue):
        promised -= {"activated"}
    for name in promised:
        assert torch.equal(got[name], results[-1][name]), f"{name}: other bits on {case.threads} threads than on one"
    terms = case.inputs // case.groups * taps
    close("y", got["y"], y64.detach(), magnitude, terms, slack)
    plain = case.activation in ("none", "relu")
    floor = 0 if plain else {torch.float64: 1e-14}.get(case.dtype, 2e-6)
    close(case.activation, got["activated"], ACTIVATIONS[case.activation](y64.detach()), magnitude, terms,
          slack if plain else 3 * slack, floor)  # fmt: skip
    if "x" in got:  # torch adds up what was padded with copies, rounding each time
        copies = 1 if case.conv.get("padding_mode", "zeros") == "zeros" else 4
        close("dx", got["x"], dx64, adx, case.out // case.groups * taps, copies * slack)
    if "values" in got:  # blocks may stick out of the weight, and hold what pack makes of it: 0
        close("dw", got["values"], layer.pack(dw64), layer.pack(adw), positions, slack)
    if "bias" in got:
        close("db", got["bias"], db64[0], adb[0], positions, slack)


def _run(case: Case, layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, like: torch.Tensor) -> dict:
    """Inference with the activation, then a step: the gradients that are wanted. Memory to be reused holds NaN."""
    for shape in (like.shape, x.shape, layer.values.shape):
        torch.full(shape, float("nan"), dtype=case.dtype)
    with torch.no_grad():
        layer.activation = case.activation
        found = {"activated": layer(x)}
        layer.activation = "none"
    leaves = {"x": x.detach(), "values": layer.values, "bias": layer.bias}
    for (name, leaf), want in zip(leaves.items(), case.wanted, strict=True):
        if leaf is not None:
            leaf.requires_grad_(want)
            leaf.grad = None
        leaves[name] = leaf if want else None
    found["y"] = layer(x.detach() if leaves["x"] is None else leaves["x"])
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    if wanted:
        grads = torch.autograd.grad(found["y"], list(wanted.values()), dy)
        found |= dict(zip(wanted, grads, strict=True))
    return {name: value.detach() for name, value in found.items()}


def run(first: int, count: int, threads: int | None = None) -> list[str]:
    """Check cases ``first`` to ``first + count``; what failed, a paragraph each."""
    failed = []
    for seed in range(first, first + count):
        case = draw(seed)
        case.threads = threads or case.threads
        try:
            check(case)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"{type(error).__name__} ({where.name}:{where.lineno}): {error}\n  {case}")
    return failed


def variants() -> list[dict[str, str]]:
    """The environments to run under: every instruction set of this CPU, and no machine code for masks."""
    build = json.loads(torch.ops.sparsekit.build_info())
    known = build["isa"][build["isa"].index(build["active_isa"]) :]  # fastest first
    return [{"SPARSEKIT_ISA": isa} for isa in known] + [{"SPARSEKIT_JIT": "0"}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10000, help="how many, divided among the instruction sets")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    parser.add_argument("--case", type=int, help="only this seed, in this process")
    parser.add_argument("--threads", type=int, help="with --here: all cases on so many, and on one")
    parser.add_argument("--here", action="store_true", help="only in this process, as the environment is")
    args = parser.parse_args()
    if args.case is not None:
        print(draw(args.case))
        check(draw(args.case))
        return 0
    if args.here:
        failed = run(args.first, args.cases, args.threads)
        print("\n".join(failed), end="\n" if failed else "")
        return 1 if failed else 0
    environments, status = variants(), 0
    for number, environment in enumerate(environments):
        first = args.first + args.cases * number // len(environments)
        count = args.first + args.cases * (number + 1) // len(environments) - first
        command = [sys.executable, __file__, "--here", "--first", str(first), "--cases", str(count)]
        start = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, **environment}, check=False)
        said = " ".join(f"{key}={value}" for key, value in environment.items())
        verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
        seconds = time.perf_counter() - start
        print(f"{said}: cases {first} to {first + count - 1}: {verdict}, {seconds:.0f} s", flush=True)
        status |= done.returncode != 0
    return status


if __name__ == "__main__":
    sys.exit(main())
