"""The reader of compiled kernels: planted faults are named, good kernels pass, and so do the shipped ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import offline  # noqa: E402
import sass  # noqa: E402

TOYS = '''
import triton
import triton.language as tl


@triton.jit
def product(x, w, col, crow, y, M, N, K, BM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr,
            STAGES: tl.constexpr):
    row = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    lo, hi = tl.load(crow + row), tl.load(crow + row + 1)
    xp = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + tl.arange(0, C)[None, :]
    wp = w + lo.to(tl.int64) * R * C + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    acc = tl.zeros((BM, R), tl.float32)
    c = tl.load(col + lo)
    for i in tl.range(lo, hi, num_stages=STAGES):
        here = c
        if AHEAD:
            c = tl.load(col + i + 1)
        else:
            here = tl.load(col + i)
        acc = tl.dot(tl.load(xp + here * C), tl.trans(tl.load(wp)), acc)
        wp += R * C
    n = row * R + tl.arange(0, R)
    ok = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=ok)


TYPES = {"x": "*bf16", "w": "*bf16", "col": "*i32", "crow": "*i32", "y": "*bf16", "M": "i32", "N": "i32", "K": "i32"}


def case(name, arch=90, BM=128, R=64, AHEAD=True, STAGES=3, divisible="x w col crow y N K"):
    constants = {"BM": BM, "R": R, "C": 64, "AHEAD": AHEAD, "STAGES": STAGES}
    return {"name": f"linear 64x64 {name}", "kernel": product, "signature": TYPES, "constexprs": constants,
            "num_warps": 4, "num_stages": STAGES, "arch": arch, "divisible": tuple(divisible.split())}


def offline_cases():
    yield case("good")
    yield case("good", 80)
    yield case("staged", AHEAD=False)
    yield case("narrow", divisible="x w col crow y")
    yield case("spill", BM=256, R=256)
    yield case("shared", STAGES=12)
    yield case("broken", BM=100)
'''


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/offline.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(TOYS)
    done = run("--cases", folder / "toys.py", "--out", folder / "out")
    assert done.returncode == 1, done.stderr
    result = json.loads((folder / "out/triton.json").read_text())
    assert result["environment"]["triton"] and result["environment"]["ptxas"]
    assert (folder / "out/triton.md").read_text().count("| linear 64x64 ") == len(result["rows"])
    return {(row["name"].split()[-1], row["arch"]): row for row in result["rows"]}


def test_a_good_kernel_passes(toys):
    row = toys["good", 90]
    assert row["violations"] == []
    assert (row["hgmma"], row["hmma"], row["copies16"], row["copies_narrow"]) == (8, 0, 12, 0)
    assert (row["ldg"], row["index_loads"], row["waits"], row["products"], row["buffers"]) == (1, 1, 1, 1, 3)
    assert row["shared"] == 3 * (128 + 64) * 64 * 2 and row["stack"] == 0 and row["ctas"] == 3
    assert 80 < row["loop"] < 120 and len(row["model"]) == 4
    old = toys["good", 80]
    assert old["violations"] == [] and (old["hgmma"], old["hmma"], old["waits"]) == (0, 64, 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("staged", "index loads staged through shared memory"),
        ("narrow", "LDG for 1 index loads"),
        ("narrow", "data loads wait for memory"),
        ("spill", "spill instructions"),
        ("spill", "wgmma is serialised"),
        ("shared", "KiB of shared memory, over 227"),
        ("broken", "does not compile"),
    ],
)
def test_planted_faults_are_named(toys, name, said):
    assert any(said in violation for violation in toys[name, 90]["violations"]), toys[name, 90]


def code(*lines, **labels):
    return sass.Code(registers=32, lines=[tuple(line.split(" ", 1)) if " " in line else (line, "") for line in lines],
                     labels={f".{name}": at for name, at in labels.items()})  # fmt: skip


def test_the_main_loop_is_the_innermost_one_with_products():
    found = code(
        "MOV R0, R1", "LDG.E R2, [R4]", "HGMMA.64x64x16.F32.BF16 R24", "BRA `(.L_inner)", "IADD3 R1",
        "BRA `(.L_outer)", "LDG.E R9", "BRA `(.L_tail)", "BRA `(.L_end)", "EXIT",
        L_outer=1, L_inner=2, L_tail=6, L_end=9,
    )  # fmt: skip
    assert found.loop() == range(2, 4)
    assert code("FFMA R0, R1, R2, R0", "BRA `(.L_x)", L_x=0).loop() == range(0, 2)
    assert code("MOV R0, R1", "BRA `(.L_x)", L_x=0).loop() is None


def intent(**changes):
    facts = {"dots": [(128, 64, 64, "bf16", "")], "indices": 1, "waiting": 0, "staged": 0, "narrow": 0, "small": 0}
    return sass.Intent(**(facts | {"buffers": 3} | changes))


@pytest.mark.parametrize(
    ("extra", "changes", "said"),
    [
        ([], {}, None),
        (["LDGSTS.E.64 [R1], [R2]"], {}, "copies of less than 16 bytes"),
        (["LDGSTS.E.64 [R1], [R2]"], {"small": 1}, None),
        (["LDG.E R1, [R2]", "LDG.E R1, [R3]"], {}, "2 LDG for 1 index loads"),
        (["LDG.E R1, [R2]", "LDG.E R1, [R3]"], {"indices": 2}, None),
        (["WARPGROUP.DEPBAR.LE gsb0, 0x0"], {}, "2 warpgroup waits for 1 products"),
        (["STL [R1], R2"], {}, "1 spill instructions"),
    ],
)
def test_rules(extra, changes, said):
    lines = ["LDGSTS.E.BYPASS.128 [R1], [R2]", "HGMMA.64x64x16.F32.BF16 R24", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    kernel = code(*lines, *extra, "BRA `(.L_x)", L_x=0)
    found = sass.report(kernel, 90, 4, 1024, intent(**changes))["violations"]
    assert found == [] if said is None else len(found) == 1 and said in found[0]


def test_products_that_fit_wgmma_must_use_it():
    kernel = code("HMMA.16816.F32.BF16 R0", "BRA `(.L_x)", L_x=0)
    assert "no HGMMA" in sass.report(kernel, 90, 4, 1024, intent())["violations"][0]
    half = intent(dots=[(32, 32, 32, "bf16", "")])
    assert sass.report(kernel, 90, 4, 1024, half)["violations"] == []
    assert sass.report(kernel, 80, 4, 1024, intent())["violations"] == []
    plain = code("FFMA R0, R1, R2, R0", "BRA `(.L_x)", L_x=0)
    assert sass.report(plain, 80, 4, 1024, intent())["violations"] == ["no tensor-core instruction"]
    assert sass.report(plain, 80, 4, 1024, intent(dots=[(64, 64, 64, "f32", "ieee")]))["violations"] == []


def test_index_loads_of_a_thread():
    blocked = "#ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>"
    assert sass._per_thread("", "", 128) == 1
    assert sass._per_thread("128x64x", blocked, 128) == 64
    assert sass._per_thread("128x", f"#ttg.slice<{{dim = 1, parent = {blocked}}}>", 128) == 8
    assert sass._per_thread("64x", f"#ttg.slice<{{dim = 0, parent = {blocked}}}>", 128) == 8
    assert sass._per_thread("256x", "#linear", 128) == 2


def test_compiling_needs_a_real_triton(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        offline.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_what_triton_meant():
    blocked = "#ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>"
    before = """
    %x = scf.for %i = %a to %b step %c : i32 {
      %d = tt.dot %p, %q, %r, inputPrecision = tf32 : tensor<128x64xf32> * tensor<64x32xf32> -> tensor<128x32xf32>
    }"""
    after = f"""#blocked = {blocked}
    %alloc = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xf32, #shared, #smem, mutable>
    %before = tt.load %z : tensor<64x64x!tt.ptr<f32>, #blocked> loc(#loc1)
    %x = scf.for %i = %a to %b step %c : i32 {{
      %0 = tt.load %m : tensor<128x!tt.ptr<i32>, #ttg.slice<{{dim = 1, parent = #blocked}}>> loc(#loc1)
      %1 = tt.load %n, %ok : !tt.ptr<i32> loc(#loc1)
      %2 = tt.load %k : tensor<64x64x!tt.ptr<f32>, #blocked> loc(#loc1)
      %3 = ttg.async_copy_global_to_local %s, %t {{contiguity = 4 : i32}} : tensor<128x64x!tt.ptr<f32>, #blocked> -> <>
      %4 = ttg.async_copy_global_to_local %s, %t {{contiguity = 1 : i32}} : tensor<128x64x!tt.ptr<f32>, #blocked> -> <>
      %5 = ttg.async_copy_global_to_local %s, %t {{contiguity = 2 : i32}} : tensor<16x16x!tt.ptr<f32>, #blocked> -> <>
      %6 = ttg.async_copy_global_to_local %s, %t : tensor<16x!tt.ptr<i32>, #blocked> -> <>
      %7 = ttng.warp_group_dot %p, %q, %r
    }} loc(#loc9)
    %after = tt.load %z : tensor<64x64x!tt.ptr<f32>, #blocked> loc(#loc1)"""
    assert sass.Intent.of(before, after, 128) == sass.Intent(
        dots=[(128, 32, 64, "f32", "tf32")], indices=9, waiting=1, staged=1, narrow=1, small=1, buffers=4
    )


MAIN = r"^(linear|linear_t|sddmm|bsr_conv2d\w*) 64x64 [A-Z]"  # bf16, no ragged edges; all of them: make offline


def test_shipped_kernels_break_no_rule(tmp_path):
    pytest.importorskip("triton")
    done = run("--filter", MAIN, "--no-cuda", "--out", tmp_path)
    rows = json.loads((tmp_path / "triton.json").read_text())["rows"]
    assert {row["name"]: row["violations"] for row in rows if row["violations"]} == {}
    assert done.returncode == 0 and {row["arch"] for row in rows} == {80, 90}
    assert all(row["hgmma"] if row["arch"] == 90 else row["hmma"] for row in rows)
    assert all(row["copies16"] and row["model"] for row in rows)
