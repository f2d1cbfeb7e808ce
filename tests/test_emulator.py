"""The emulator itself: collectives against the documented fragment layouts, and planted bugs that must be found."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from emulated import COMPILER, ROOT, Kernels, build, int32, nan, python  # noqa: E402

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

SOURCES = [ROOT / "csrc/cuda/launch.cu", ROOT / "tests/emulator_driver.cu"]
# Fragment layouts as the PTX ISA gives them: element i of lane 4 g + t. Here once more, independently of the emulator.
LANES = [(lane, lane // 4, lane % 4) for lane in range(32)]


@pytest.fixture(scope="module")
def driver():
    return Kernels(build("plain", SOURCES, "driver"))


@pytest.fixture(autouse=True)
def _seed(driver):
    driver.seed(3)


def bf16(values):
    return torch.from_numpy(values).to(torch.bfloat16)


# ---- collectives ---------------------------------------------------------------------------------------

OPERATIONS = ["bf16", "f16", "tf32", "sparse bf16", "sparse f16"]


def as_stored(operation, values):
    """float32 values rounded to what a fragment holds, and their bits."""
    if operation.endswith("bf16"):
        rounded = bf16(values)
        return rounded.double().numpy(), rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    if operation.endswith("f16"):
        rounded = values.astype(np.float16)
        return rounded.astype(np.float64), rounded.view(np.uint16).astype(np.uint32)
    bits = values.view(np.uint32)
    return (bits & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64), bits


def fragments(bits, positions, registers, per_register):
    """uint32 [32, registers]; positions(g, t, i) names the element of the matrix that element i of a lane holds."""
    out = np.zeros((32, registers), np.uint32)
    for lane, g, t in LANES:
        for i in range(registers * per_register):
            out[lane, i // per_register] |= bits[positions(g, t, i)] << np.uint32(16 * (i % per_register))
    return out


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_mma(driver, operation, selector):
    rng = np.random.default_rng(0)
    number, sparse, tf32 = OPERATIONS.index(operation), "sparse" in operation, operation == "tf32"
    depth = 8 if tf32 else 16  # of a as it is stored
    a, a_bits = as_stored(operation, rng.standard_normal((16, depth)).astype(np.float32))
    b, b_bits = as_stored(operation, rng.standard_normal((2 * depth if sparse else depth, 8)).astype(np.float32))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    metadata = np.zeros(32, np.uint32)
    dense = a
    if sparse:
        kept = np.stack([np.sort(rng.permutation(4)[:2]) for _ in range(16 * 8)]).reshape(16, 16)
        dense = np.zeros((16, 32))
        metadata[:] = rng.integers(0, 2**32, 32, dtype=np.uint32)  # lanes that are not selected are ignored
        metadata.reshape(8, 4)[:, 2 * selector : 2 * selector + 2] = 0
        for row in range(16):
            for k in range(16):
                dense[row, 4 * (k // 2) + kept[row, k]] = a[row, k]
                lane = 4 * (row % 8) + 2 * selector + k // 8
                metadata[lane] |= np.uint32(kept[row, k]) << np.uint32(16 * (row // 8) + 2 * (k % 8))
    if tf32:
        fa = fragments(a_bits, lambda g, t, i: (g + 8 * (i % 2), t + 4 * (i // 2)), 4, 1)
        fb = fragments(b_bits, lambda g, t, i: (t + 4 * i, g), 2, 1)
    else:
        fa = fragments(a_bits, lambda g, t, i: (g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)), 4, 2)
        fb = fragments(b_bits, lambda g, t, i: (2 * t + i % 2 + 8 * (i // 2), g), 4 if sparse else 2, 2)
    d = np.array([[c[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)] for _, g, t in LANES])
    driver("driver_mma", int32(number), int32(selector), fa, fb, metadata, d)
    got = np.zeros((16, 8))
    for lane, g, t in LANES:
        for i in range(4):
            got[g + 8 * (i // 2), 2 * t + i % 2] = d[lane, i]
    np.testing.assert_allclose(got, dense @ b + c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(driver, count, transposed):
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)  # lane 8 i + r gives row r of matrix i
    out = np.zeros((32, count), np.uint32)
    driver("driver_ldmatrix", int32(count), int32(transposed), rows, out)
    for lane, g, t in LANES:
        for i in range(count):
            matrix = rows[8 * i : 8 * i + 8].T if transposed else rows[8 * i : 8 * i + 8]
            assert out[lane, i] == int(matrix[g, 2 * t]) | int(matrix[g, 2 * t + 1]) << 16


def test_warp_operations(driver):
    values = np.random.default_rng(0).integers(0, 1000, 32).astype(np.int32)
    out = np.zeros((6, 32), np.int32)
    driver("driver_shuffle", values, out)
    lane = np.arange(32)
    assert np.array_equal(out[0], values[3 * lane % 32])
    assert np.array_equal(out[1], values[lane ^ 5])
    assert np.array_equal(out[2], values[np.where(lane < 3, lane, lane - 3)])
    assert np.array_equal(out[3], values[np.where(lane + 7 > 31, lane, lane + 7)])
    votes = sum(1 << i for i in range(32) if values[i] % 2)
    assert np.array_equal(out[4].view(np.uint32), np.full(32, votes, np.uint32))
    assert np.array_equal(out[5], np.full(32, 2))


def test_conversions(driver):
    rng = np.random.default_rng(0)
    special = [0, -0.0, 1, 65504, 65519.99, 65520, 1e6, np.inf, -np.inf, 2.0**-14, 2.0**-24, 2.0**-25, 6e-8, 3e38]
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([np.array(special, np.float32), bits[np.isfinite(bits)]])
    values = np.concatenate([values, rng.standard_normal(1000).astype(np.float32)])
    values = np.concatenate([values, (rng.integers(0, 4096, 1000) * 2.0**-26).astype(np.float32)])  # subnormal halves
    for half in (0, 1):
        packed, tf32 = np.zeros(len(values), np.uint32), np.zeros(len(values), np.uint32)
        back = nan(len(values))
        driver("driver_convert", int32(half), values, packed, back, tf32, int32(len(values)))
        expected = torch.from_numpy(values).to(torch.float16 if half else torch.bfloat16)
        assert np.array_equal(packed >> 16, expected.view(torch.int16).numpy().view(np.uint16))
        assert np.array_equal(back, expected.float().numpy())
    finite = np.isfinite(values) & (np.abs(values) < 3e38)
    step = np.maximum(np.exp2(np.floor(np.log2(np.maximum(np.abs(values[finite]), 2.0**-126))) - 10), 2.0**-136)
    assert (tf32 & 0x1FFF == 0).all()
    assert (np.abs(tf32.view(np.float32)[finite].astype(np.float64) - values[finite]) <= step / 2).all()


@pytest.mark.parametrize("given", [16, 8, 5, 0])
def test_copies_fill_with_zeros(driver, given):
    source = np.random.default_rng(0).integers(1, 256, (64, 16)).astype(np.uint8)
    out = np.zeros((64, 48), np.uint8)
    driver("driver_copy", source, int32(given), out)
    for start, size in ((0, 16), (16, 8), (32, 4)):
        expected = source[:, :size].copy()
        expected[:, given:] = 0
        assert np.array_equal(out[:, start : start + size], expected)
    assert (out[:, 36:].view(np.uint32) == 7).all()


def test_atomics(driver):
    total, count, bits = np.zeros(1, np.float32), np.zeros(2, np.int32), np.zeros(1, np.uint32)
    driver("driver_atomic", int32(3), total, count, bits)
    assert total[0] == 96
    assert count.tolist() == [192, 191]
    assert bits[0] == 0xFFFFFFFF


def test_impossible_launches(driver):
    for shape, sentence in (
        ((1, 1, 33, 0), "33 x 1 x 1 threads: expected x a multiple of 32"),
        ((1, 1, 2048, 0), "2048 x 1 x 1 threads"),
        ((1, 70000, 32, 0), "at most 2^31 - 1 x 65535 x 65535"),
        ((1, 1, 32, 300000), "300000 bytes of shared memory: a block has at most 232448"),
    ):
        with pytest.raises(RuntimeError, match="blocks on ") as failed:
            driver("driver_blocks", *map(int32, shape[:3]), shape[3])
        assert sentence in str(failed.value)
    driver("driver_blocks", int32(0), int32(1), int32(32), 0)  # an empty grid is nothing to do


# ---- a pipeline, correct and with one bug each -----------------------------------------------------------

BUGS = """none, short piece, long read, no barrier after wait, no barrier before reuse, no wait, lax wait,
divergent barrier, shuffle as fence, block race, early return, divergent shuffle, mismatched barrier,
in flight at end, too much shared, misaligned, uninitialized, global ldmatrix, short stage, overrun, read in flight,
misaligned vector"""
BUGS = [bug.strip() for bug in BUGS.split(",")]
STEPS, COLUMNS = 5, 100


def pipeline(driver, bug):
    """None, or what is wrong: the error's sentence, or that the result is."""
    x = np.random.default_rng(0).random((STEPS, COLUMNS), np.float32)
    y = nan(COLUMNS)
    try:
        driver("driver_pipeline", int32(BUGS.index(bug)), x, y, int32(STEPS), int32(COLUMNS))
    except RuntimeError as failed:
        return str(failed)
    padded = np.pad(x, ((0, 0), (0, 28))).reshape(STEPS, 2, 64)
    expected = np.roll(padded, -1, 2).reshape(STEPS, 128)[:, :COLUMNS].sum(0)
    return None if np.allclose(y, expected, rtol=1e-6) else "wrong result"


@pytest.mark.parametrize("seed", range(12))
def test_correct_pipeline(driver, seed):
    driver.seed(seed)
    assert pipeline(driver, "none") is None


@pytest.mark.parametrize(
    "bug, sentence",
    {
        "short piece": "cp_async outside of shared memory (thread 63 of block",
        "short stage": "cp_async outside of shared memory (thread 63 of block",
        "overrun": "wrote behind its piece 0 of shared memory (256 bytes)",
        "no barrier after wait": "wrong result",
        "no barrier before reuse": "wrong result",
        "lax wait": "wrong result",
        "uninitialized": "wrong result",
        "no wait": "returned with asynchronous copies in flight",
        "in flight at end": "returned with asynchronous copies in flight",
        "divergent barrier": "mismatched barriers: thread",
        "mismatched barrier": "mismatched barriers: thread",
        "early return": "deadlock: thread",
        "divergent shuffle": "divergent warp operations: thread",
        "too much shared": "piece 0 ends at byte 400000 of shared memory, the launch asked for 640",
        "misaligned": "cp_async at an address that is no multiple of 16",
        "global ldmatrix": "ldmatrix outside of shared memory",
    }.items(),
)
def test_found_by_the_scheduler(driver, bug, sentence):
    for seed in range(6):
        driver.seed(seed)
        found = pipeline(driver, bug)
        assert found is not None, f"seed {seed}"
        assert sentence in found, found
        if sentence != "wrong result":
            assert found.startswith("pipeline on x [5, 100]: "), found
    assert pipeline(driver, "none") is None  # a failed launch leaves nothing behind


def test_errors_name_both_lines(driver):
    lines = (ROOT / "tests/emulator_driver.cu").read_text().splitlines()
    found = pipeline(driver, "mismatched barrier")
    first = next(i for i, line in enumerate(lines, 1) if "if (self < 32) __syncthreads();" in line)
    assert f"emulator_driver.cu:{first}" in found
    assert f"emulator_driver.cu:{first + 2}" in found


def in_process(mode, bug, seed):
    """Exit status and output of a process in which a sanitizer watches the pipeline."""
    library = build(mode, SOURCES, "driver")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import numpy as np; from emulated import *\n"
        f"driver = Kernels({str(library)!r}); driver.seed({seed})\n"
        f"x, y = np.ones(({STEPS}, {COLUMNS}), np.float32), nan({COLUMNS})\n"
        f"driver('driver_pipeline', int32({BUGS.index(bug)}), x, y, int32({STEPS}), int32({COLUMNS}))\n"
        "print('finished')\n"
    )
    done = python(mode, "-c", code)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "mode, bug, report",
    [
        ("asan", "long read", "heap-buffer-overflow"),
        ("asan", "overrun", "heap-buffer-overflow"),
        ("asan", "read in flight", "use-after-poison"),
        ("asan", "misaligned vector", "misaligned address"),
        ("tsan", "no barrier after wait", "data race"),
        ("tsan", "no barrier before reuse", "data race"),
        ("tsan", "shuffle as fence", "data race"),
        ("tsan", "block race", "data race"),
    ],
)
def test_found_by_a_sanitizer(mode, bug, report):
    status, output = in_process(mode, bug, seed=2)
    assert status != 0, output
    assert report in output, output[-3000:]


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizers_accept_the_correct_pipeline(mode):
    status, output = in_process(mode, "none", seed=2)
    assert status == 0, output[-3000:]
    assert "finished" in output


def test_seeds_choose_the_order(driver):
    orders = set()
    for seed in (0, 1, 2, 2, 3):
        driver.seed(seed)
        y = nan(COLUMNS)
        x = np.ones((1, COLUMNS), np.float32)
        driver("driver_pipeline", int32(BUGS.index("block race")), x, y, int32(1), int32(COLUMNS))
        orders.add((seed, float(y[0])))
    assert len(orders) == 4, "the same seed gave two orders"
    assert {last for _, last in orders} == {0.0, 1.0}, "blocks always ran in the same order"


def test_ucontext_where_there_is_no_assembler_switch():
    other = Kernels(build("plain", SOURCES, "driver-ucontext", ["-DEMU_UCONTEXT"]))
    other.seed(2)
    assert pipeline(other, "none") is None
    assert "deadlock" in pipeline(other, "early return")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_every_instruction_compiles_for_a_gpu(tmp_path):
    """The driver uses all of ptx.cuh: what the emulator accepts, the assembler accepts too."""
    command = ["nvcc", "-std=c++20", "-O1", "-arch=sm_80", "-cubin", f"-I{ROOT / 'csrc'}", str(SOURCES[1])]
    done = subprocess.run([*command, "-o", str(tmp_path / "driver.cubin")], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
