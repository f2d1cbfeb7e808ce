"""``benchmarks/gpu.py`` without a GPU: cases, masks, limits, statistics, tables, and a dry run on the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsekit import Pattern

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_bench  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_rows  # noqa: E402
import limits  # noqa: E402

CPU = torch.device("cpu")
SMALL = gpu_cases.Case("layers", "linear-4096", block=(64, 64), density=0.5)
CONV = gpu_cases.Case("layers", "conv-256-28", block=(32, 32), density=0.25)
CARD = limits.Card("round", {"bfloat16": 100e12, "float32": 10e12}, 1e12, 5e12)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(gpu_bench, "_SECONDS", 0.001)
    return gpu_bench.Bench(CPU, tiny=True)


def test_cases_come_once_ceilings_first_and_cover_the_tables():
    for cases in (gpu_cases.suite(), gpu_cases.experiments()):
        names = [case.name for case in cases]
        assert len(names) == len(set(names))
        assert cases[0].what == "copy"
    cases = gpu_cases.suite()
    linear = {(c.block, c.density) for c in cases if c.layer == "linear-4096" and c.dtype == "bfloat16"}
    blocks = ((128, 128), (64, 64), (32, 32), (16, 16), (128, 16))
    assert linear >= {(block, density) for block in blocks for density in (0.5, 0.25, 0.1, 0.05)}
    assert {c.dtype for c in cases if c.layer} == {"bfloat16", "float16", "tf32", "float32"}
    assert {c.layer for c in cases if c.layer} == set(gpu_cases.LAYERS)
    short = gpu_cases.quick(cases)
    assert {c.suite for c in short} == {"ceilings", "layers"} and len(short) < 12


@pytest.mark.parametrize("shape", [(256, 256), (100, 72), (64, 48, 3, 3)])
def test_masks_have_whole_blocks_of_an_exact_number(shape):
    case = gpu_cases.Case("layers", "linear-4096", block=(32, 16), density=0.25)
    mask = gpu_bench.mask_of(case, shape, CPU)
    assert mask.shape == shape and Pattern.parse("block:32x16").holds(mask)
    tiles = Pattern.parse("block:32x16").group_scores(mask.float(), mask)[1]
    assert int(tiles.sum()) == round(0.25 * tiles.numel())
    assert torch.equal(mask, gpu_bench.mask_of(case, shape, CPU))


def test_limits_by_hand():
    of = limits.Product("forward", 1000, 200, 100, 0.5)
    assert of.flops == 2 * 1000 * 200 * 100 * 0.5
    assert of.bytes == 2 * (1000 * 100 + 1000 * 200 + 200 * 100 * 0.5)
    assert limits.limit(of, CARD, "bfloat16") == pytest.approx(of.bytes / 1e12 * 1e6)  # memory binds
    assert limits.limit(of, CARD._replace(copy=1e15), "float32") == pytest.approx(of.flops / 10e12 * 1e6)
    step = of._replace(work="step")
    assert (step.flops, step.bytes) == (3 * of.flops, 3 * of.bytes)
    conv = limits.Product("forward", 1000, 200, 900, 0.5, taps=9)
    assert conv.bytes == 2 * (1000 * 100 + 1000 * 200 + 200 * 900 * 0.5)


def test_model_gives_the_known_table():
    # Relative to a dense product of 0.696 ms at M = 16384, 4096 x 4096, tiles of 256: the table of the design.
    for block, half in ((128, 0.85), (64, 1.41), (32, 2.55), (16, 4.8)):
        of = limits.Product("forward", 16384, 4096, 4096, 0.5)
        us = limits.model(of, (block, block), 256, limits.H200, "bfloat16")
        assert us / 696 == pytest.approx(half, rel=0.01)
    tall = limits.Product("dx", 16384, 4096, 4096, 0.5)
    assert limits.model(tall, (128, 16), 256, limits.H200, "bfloat16") / 696 == pytest.approx(4.8, rel=0.01)


def test_occupancy():
    assert limits.ctas(90, 122, 72 * 1024, 4) == (3, "shared memory")
    assert limits.ctas(90, 188, 64 * 1024, 8) == (1, "registers")
    assert limits.ctas(80, 24, 0, 8) == (8, "threads")
    assert limits.ctas(80, 32, 164 * 1024, 4)[0] == 0


def test_statistics():
    spread = gpu_rows.Spread.of([10, 20, 30, 40, 50, 1000], [1, 2, 3, 4, 5, 6])
    assert (spread.p20, spread.p50, spread.p80, spread.host) == (20, 35, 50, 3.5)
    assert gpu_bench.sets_needed(10**9, 60 * 2**20) == 2
    assert gpu_bench.sets_needed(50 * 2**20, 60 * 2**20) * 50 > 3 * 60
    assert gpu_bench.sets_needed(1, 60 * 2**20) == 16


def test_a_row_takes_the_best_dense_rival_and_its_limit():
    spread = gpu_rows.Spread(9.0, 10.0, 11.0, 1.0)
    rivals = {"dense": 30.0, "dense compiled": 20.0, "2:4": 5.0, "torch bsr": "missing"}
    of = limits.Product("forward", 1000, 200, 100, 0.5)
    row = gpu_rows.row(SMALL, "forward", {"device": "d"}, spread, rivals=rivals, of=of, card=CARD, error=1e-3)
    assert row["ratio"] == 2.0 and row["rivals"] == rivals
    assert row["percent_of_limit"] == pytest.approx(100 * of.bytes / 1e6 / 10)
    assert row["name"] == f"{SMALL.name}-forward" and json.loads(json.dumps(row)) == row
    unknown = gpu_rows.row(SMALL, "forward", {}, spread, of=of)
    assert unknown["limit_us"] is None and unknown["ratio"] is None


def test_the_card_is_what_its_ceilings_measured():
    def ceiling(what, rate):
        case = gpu_cases.Case("ceilings", what=what)
        return gpu_rows.row(case, what, {}, gpu_rows.Spread(1, 1, 1, 1), rate=rate)

    rows = [ceiling("copy", 4e12), ceiling("l2-read", 6e12), ceiling("conv-256", 7e14)]
    assert gpu_rows.card_of(rows) is None
    card = gpu_rows.card_of([*rows, ceiling("gemm-bfloat16", 6e14), ceiling("gemm-tf32", 3e14)])
    assert (card.copy, card.l2, card.flops["tf32"]) == (4e12, 6e12, 3e14)
    assert card.flops["bfloat16"] == card.flops["float16"] == 7e14


def test_table_marks_losses_and_names_what_failed():
    spread = gpu_rows.Spread(9.0, 10.0, 11.0, 1.0)
    facts = {"device": "card", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "dirty": True}
    rows = [
        gpu_rows.row(SMALL, "forward", facts, spread, rivals={"dense": 5.0, "2:4": "RuntimeError: no"}),
        gpu_rows.row(SMALL, "dx", facts, spread, rivals={"dense": 20.0}),
        gpu_rows.failed(CONV, "all", "TimeoutError: took more than 3 s", facts),
    ]
    text = gpu_rows.table(rows)
    assert "card, driver 1" in text and "abc (changed)" in text
    assert "10.0 (**0.50x**)" in text and "10.0 (2.00x)" in text and "2:4 (RuntimeError: no)" in text
    assert f"- {CONV.name} all: TimeoutError" in text
    assert gpu_rows.table([]) == "no rows"


def test_a_torn_line_is_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert gpu_rows.read_rows(file) == []
    file.write_text('{"case": "a"}\n{"case": "b')
    assert gpu_rows.read_rows(file) == [{"case": "a"}]


def test_measure_goes_on_without_a_thunk_that_fails_and_rotates():
    seen = []

    def broken(i):
        raise MemoryError("no room")

    found = gpu_bench.measure({"ours": seen.append, "broken": broken}, 3, gpu_bench.Wall(), seconds=0.001)
    assert found["broken"] == "MemoryError: no room" and found["ours"].p50 > 0
    assert seen[:6] == [0, 1, 2, 0, 1, 2]
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        gpu_bench.measure({"ours": lambda i: (_ for _ in ()).throw(lost)}, 1, gpu_bench.Wall())


def test_time_limit():
    with pytest.raises(TimeoutError, match="more than 0 s"), gpu_bench.time_limit(0.05):
        time.sleep(2)
    with gpu_bench.time_limit(5):
        pass


@pytest.mark.parametrize("case", [SMALL, CONV], ids=lambda case: case.layer)
def test_every_work_is_checked_and_timed(bench, case):
    bench.card = CARD
    rows = list(bench.rows(case))
    assert [row["work"] for row in rows] == list(gpu_cases.WORKS)
    for row in rows:
        assert row["failed"] is None and row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert 0 < row["error"] < gpu_bench.TOLERANCE["bfloat16"] and row["rivals"].keys() == {"dense"}
        assert row["limit_us"] > 0 and row["device"] == "cpu"


@pytest.mark.parametrize("work", gpu_cases.WORKS)
@pytest.mark.parametrize("case", [SMALL, CONV], ids=lambda case: case.layer)
def test_a_wrong_result_is_seen(bench, case, work):
    setup = bench.setup(case)
    assert gpu_bench.error_of(work, gpu_bench.runner(setup.sparse, setup.xs, setup.dys, work), setup) < 4e-3

    def spoiled(i):
        results = gpu_bench.runner(setup.sparse, setup.xs, setup.dys, work)(i)
        for tensor in (results,) if work == "forward" else results:
            with torch.no_grad():
                tensor.mul_(1.05)
        return results

    assert gpu_bench.error_of(work, spoiled, setup) > 4e-3

    def poisoned(i):
        results = spoiled(i)
        with torch.no_grad():
            (results if work == "forward" else results[-1]).fill_(torch.nan)
        return results

    assert not gpu_bench.error_of(work, poisoned, setup) < 4e-3


def test_a_wrong_result_is_not_timed(bench, monkeypatch):
    monkeypatch.setattr(gpu_bench, "error_of", lambda *_: 0.5)
    rows = list(bench.rows(SMALL))
    assert all(row["p50_us"] is None and "not timed" in row["failed"] for row in rows) and len(rows) == 4


def test_what_is_missing_here_is_a_row(bench):
    unknown = gpu_cases.Case("layers", "linear-4096", format="unheard-of", block=(1, 1), density=0.5)
    (row,) = bench.rows(unknown)
    assert "got 'unheard-of'" in row["failed"] and row["p50_us"] is None
    (row,) = bench.rows(gpu_cases.Case("ceilings", what="l2-read"))
    assert "CUDA device" in row["failed"]
    (row,) = bench.rows(gpu_cases._try("forward", "linear-4096", (64, 64), 0.5, BM=128))
    assert "no GPU kernel ran" in row["failed"]


def test_missing_packages_are_named_with_the_way_to_bring_them(monkeypatch):
    import importlib.util

    assert gpu.missing("bench") is None or "triton" in gpu.missing("bench")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("pytest", "hypothesis") else name)
    text = gpu.missing("test")
    assert "without pytest hypothesis" in text
    assert "pip download" in text and "--no-index --find-links wheels pytest hypothesis" in text
    assert gpu.missing("bench") is None


def test_dry_run_writes_rows_and_resumes(tmp_path):
    command = [
        sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--quick", "--minutes", "2",
        "--out", str(tmp_path), "--filter",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pytest.importorskip("triton")

    def run(words):
        return subprocess.run(
            [*command, words], cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=120
        )

    assert "gemm-bfloat16" in run("ceilings").stdout
    done = run("linear-4096-64x64")
    rows = gpu_rows.read_rows(tmp_path / "rows.jsonl")
    layers = [row for row in rows if row["suite"] == "layers"]
    assert {row["work"] for row in layers} == set(gpu_cases.WORKS)
    assert all(row["percent_of_limit"] > 0 for row in layers)
    assert (tmp_path / "gpu.md").read_text().strip() in done.stdout
    run("linear-4096-64x64")
    assert gpu_rows.read_rows(tmp_path / "rows.jsonl") == rows


def test_a_worker_that_dies_costs_one_case(tmp_path, monkeypatch):
    args = gpu.parse(["--out", str(tmp_path), "--filter", "ceilings/gemm", "--minutes", "1"])
    names = [case.name for case in gpu.chosen(args)]
    assert len(names) == 3
    stub = tmp_path / "worker.py"
    stub.write_text(
        "import json, os, sys, time\n"
        f"out, names = {str(tmp_path)!r}, {names!r}\n"
        "rows = os.path.join(out, 'rows.jsonl')\n"
        "done = {json.loads(l)['case'] for l in open(rows)} if os.path.exists(rows) else set()\n"
        "for name in names:\n"
        "    if name in done: continue\n"
        "    open(os.path.join(out, 'current'), 'w').write(name)\n"
        "    if name == names[1]: time.sleep(0.5); os.abort()\n"
        "    open(rows, 'a').write(json.dumps({'case': name, 'failed': None}) + '\\n')\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command: popen([sys.executable, str(stub)]))
    gpu.supervise(args, [])
    rows = gpu_rows.read_rows(tmp_path / "rows.jsonl")
    assert [row["case"] for row in rows] == names
    assert [bool(row["failed"]) for row in rows] == [False, True, False]
    assert "died with status" in rows[1]["failed"]


def test_a_worker_that_hangs_is_stopped(tmp_path, monkeypatch):
    args = gpu.parse(["--out", str(tmp_path), "--filter", "ceilings/copy", "--minutes", "1"])
    stub = tmp_path / "worker.py"
    stub.write_text(
        f"import time\nopen({str(tmp_path / 'current')!r}, 'w').write('ceilings/copy')\ntime.sleep(60)\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command: popen([sys.executable, str(stub)]))
    monkeypatch.setattr(gpu, "_ROW_SECONDS", 1)
    started = time.time()
    gpu.supervise(args, [])
    (row,) = gpu_rows.read_rows(tmp_path / "rows.jsonl")
    assert "stopped after" in row["failed"] and time.time() - started < 30


INTERPRETED = """
import sys
sys.path[:0] = ["tests", "benchmarks"]
import interpreter
interpreter.patch()
import torch

from sparsekit import Pattern
import gpu_bench
import gpu_cases
gpu_bench._SECONDS = 0.001
bench = gpu_bench.Bench(torch.device("cpu"), tiny=True)
tried = [gpu_cases._try("forward", "linear-4096", (64, 64), 0.1, num_stages=2),
         gpu_cases._try("dw", "linear-4096", (64, 64), 0.1, J=1), gpu_cases._try("dx", "conv-256-28", (64, 64), 0.1),
         gpu_cases._try("forward", "linear-4096", (64, 64), 0.1, unheard_of=2)]
for case in tried:
    for row in bench.rows(case):
        print(row["failed"], "|", row["error"], "|", row["config"])
"""


def test_experiments_run_the_launchers_with_their_configurations():
    pytest.importorskip("triton")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=200)
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    assert [line[0] == "None" for line in lines] == [True, True, True, False], done.stdout
    assert all(float(line[1]) < 4e-3 for line in lines[:3])
    assert "'num_stages': 2" in lines[0][2] and "'J': 1" in lines[1][2] and "unheard_of" in lines[3][0]
