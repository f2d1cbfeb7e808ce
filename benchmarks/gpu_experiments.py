"""Launch configurations of the block kernels, one knob at a time, against the traffic that a model expects.

``rate`` of a row is the bytes that its tiles ask of L2 over its time: what the card's ``l2-read`` ceiling is
to be compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpu_cases import Case
from gpu_rows import product, row

if TYPE_CHECKING:
    from gpu_bench import Bench, Run, Setup


def rows(bench: Bench, case: Case) -> Iterator[dict]:
    """The row of an experiment: the default configuration with ``case.config`` over it."""
    from gpu_bench import TOLERANCE, error_of, measure, runner

    from sparsekit.kernels import tuning

    work = case.works[0]
    setup = bench.setup(case)
    setup.sparse.derive()
    offered: dict[str, dict] = {}
    choose = tuning.choose

    def first(kernel, key, configs, launch, where):
        offered[kernel] = configs[0]
        return configs[0]

    tuning.choose = first
    try:
        runner(setup.sparse, setup.xs[:1], setup.dys[:1], work)(0)
    finally:
        tuning.choose = choose
    if not offered:
        raise RuntimeError("Expected a kernel with configurations, got none: no GPU kernel ran")
    default = next(reversed(offered.values()))
    if unknown := dict(case.config).keys() - default.keys():
        raise KeyError(f"Expected knobs among {sorted(default)}, got {sorted(unknown)}")
    config = default | dict(case.config)
    run = launcher(setup, work, config)
    if not (error := error_of(work, run, setup)) < TOLERANCE[case.dtype]:
        raise AssertionError(f"Expected float64 within {TOLERANCE[case.dtype]:g}, got {error:.1e}; not timed")
    spread = measure({"it": run}, len(setup.xs), bench.clock)["it"]
    if isinstance(spread, str):
        raise RuntimeError(spread)
    of = product(case, setup.layer, work)
    across = case.block[1] if work == "dx" else case.block[0]
    tile = config.get("BM") if work != "dw" else config.get("J", 1) * case.block[1]
    moved = of.flops / 2 * (1 / across + 1 / (tile or 128)) * of.itemsize
    yield row(
        case, work, bench.facts, spread, of=of, card=bench.card, error=error, config=config,
        shape=(*setup.layer.input, setup.layer.out), rate=moved / spread.p50 * 1e6,
    )  # fmt: skip


def launcher(setup: Setup, work: str, config: dict) -> Run:
    """The launcher of a verb with an explicit configuration."""
    from sparsekit.kernels.bsr import conv, linear

    part = setup.sparse._buffers
    values, xs, dys = setup.sparse.values.detach(), setup.xs, setup.dys
    block, (out, inputs) = list(values.shape[1:]), setup.sparse.shape[:2]
    rows = part["crow_indices"], part["col_indices"]
    columns = part["t_crow"], part["t_row"], part["t_perm"], part["t_order"]
    runs, order = part["runs"], part["row_order"]
    bias = setup.sparse.bias.detach()
    if setup.layer.kind == "linear":
        return {
            "forward": lambda i: linear.linear(xs[i], values, *rows, order, bias, out, "none", config),
            "dx": lambda i: (linear.linear_t(dys[i], values, *columns, inputs, config),),
            "dw": lambda i: (linear.sddmm(dys[i], xs[i], *rows, runs, block, config),),
        }[work]
    side, window = list(setup.xs[0].shape[2:]), ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    return {
        "forward": lambda i: conv.conv2d(xs[i], values, *rows, order, bias, out, *window, "none", config),
        "dx": lambda i: (conv.conv2d_t(dys[i], values, *columns, inputs, side, *window, config),),
        "dw": lambda i: (conv.conv2d_sddmm(dys[i], xs[i], *rows, runs, block, *window, config),),
    }[work]
