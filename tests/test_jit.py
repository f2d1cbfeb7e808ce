"""Machine code for a mask: right, in a known amount of memory, and never missed where it cannot be had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.kernels.csr import layout
from sparsekit.nn import SparseConv2d, SparseLinear

sys.path.insert(0, str(Path(__file__).parent))
from test_csr_ops import (  # noqa: E402
    DTYPES,
    LAYOUTS,
    check,
    check_activations,
    linear_oracle,
    native_library_is_missing,
    ops,
    pack,
    poison,
    randn,
)


def available():
    return json.loads(ops.build_info())["machine_code"] if not native_library_is_missing() else "no native library"


pytestmark = pytest.mark.skipif(available() != "yes", reason=f"machine code: {available()}")

CACHE = 64 << 20


def mappings():
    """(permissions, bytes) of the anonymous memory of this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" and not name:
            begin, end = (int(address, 16) for address in extent.split("-"))
            found.append((permissions, end - begin))
    return found


def code_bytes():
    """Executable anonymous memory; other libraries may have some too."""
    return sum(size for permissions, size in mappings() if "x" in permissions)


def alone(name):
    """Run a function of this file in a process whose memory holds nobody else's code."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); import test_jit; test_jit.{name}()"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def masked(shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    if min(shape) > 3:
        mask[1] = False  # an empty row
        mask[:, 2] = False  # and an empty column
    return pack(torch.randn(shape, generator=generator), mask)


def key_of(w):
    return layout.code_key(*w.csr)


def check_linear(n, w, dtype=torch.float32, layout=lambda t: t):
    out, features = w.dense.shape
    w = w if dtype == torch.float32 else pack(w.dense.to(dtype), w.mask)
    x, dy = layout(randn(n, features, dtype=dtype)), layout(randn(n, out, dtype=dtype, seed=2))
    bias = randn(out, dtype=dtype, seed=3)
    y, dx, dv, db = linear_oracle(x, w, bias, dy)
    poison(y.to(dtype), dx.to(dtype), dv.to(dtype))
    check(ops.csr_linear(x, w.values, *w.csr, bias, key_of(w)), y, dtype)
    check(ops.csr_linear(x, w.values, *w.csr, None, key_of(w)), y - bias.double(), dtype)
    got = ops.csr_linear_backward(dy, x, w.values, *w.csr, *w.csc, True, True, True, key_of(w))
    for g, e in zip(got, (dx, dv, db), strict=True):
        check(g, e, dtype)
    poison(dx.to(dtype))
    check(ops.csr_linear_backward(dy, x, w.values, *w.csr, *w.csc, True, False, False, key_of(w))[0], dx, dtype)


# ---- results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 17, 33, 64, 130, 300])
@pytest.mark.parametrize(
    "shape", [(28, 64), (29, 600), (1, 300), (300, 1), (57, 1030), (300, 784), (64, 2100), (1030, 57)], ids=str
)
def test_shapes(shape, n):
    for density in (0.2, 0.5, 1):
        check_linear(n, masked(shape, density, seed=n))


def both_directions(density=0.4, seed=1234):
    w, x, dy = masked((301, 401), density, seed), randn(64, 401), randn(64, 301)
    calls = {
        "forward": lambda *key: ops.csr_linear(x, w.values, *w.csr, None, *key),
        "dx": lambda *key: ops.csr_linear_backward(dy, x, w.values, *w.csr, *w.csc, True, True, True, *key)[0],
    }
    before = code_bytes()
    for call in calls.values():
        assert not torch.equal(call(), call(key_of(w)))  # another order of additions
    assert code_bytes() - before >= 14 * w.values.numel()
    assert not any("w" in permissions and "x" in permissions for permissions, _ in mappings())


def both_directions_of_a_thin_mask():
    both_directions(0.12, 4321)  # few values share a cache line: dX reads a gathered copy of them


def test_code_runs_in_both_directions_and_its_pages_are_never_writable():
    alone("both_directions")
    alone("both_directions_of_a_thin_mask")


def code_of_millions_of_survivors():
    w, x = masked((1024, 2048), 0.55, seed=5), randn(16, 2048)
    before = code_bytes()
    check(ops.csr_linear(x, w.values, *w.csr, None, key_of(w)), x.double() @ w.dense.double().t(), torch.float32)
    assert code_bytes() - before >= 7 * w.values.numel()
    w = masked((1024, 4096), 0.55, seed=6)
    ops.csr_linear(randn(16, 4096), w.values, *w.csr, None, key_of(w))
    assert code_bytes() - before < 14 * w.values.numel()  # too large to be worth it


def test_code_has_a_limit():
    alone("code_of_millions_of_survivors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype):
    check_linear(65, masked((150, 170), 0.4), dtype)


def test_activations():
    w = masked((150, 170), 0.4)
    check_activations(65, w, torch.float32, key_of(w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(name, dtype):
    check_linear(40, masked((90, 110), 0.5), dtype, LAYOUTS[name])


def test_rows_of_very_different_length():
    """Anchors of rows that share one must follow both a full row and one with a survivor here and there."""
    generator = torch.Generator().manual_seed(5)
    share = torch.rand(120, 1, generator=generator) ** 3
    mask = torch.rand(120, 1500, generator=generator) < share
    mask[::7] = True
    check_linear(48, pack(torch.randn(120, 1500, generator=generator), mask))
    check_linear(48, pack(torch.randn(1500, 120, generator=generator), mask.t().contiguous()))


def test_a_batch_too_large_to_pack_at_once():
    check_linear(4100, masked((60, 1100), 0.2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(16, 90), st.integers(1, 1400), st.integers(1, 120), st.floats(0, 1), st.integers(0, 9))
def test_any_shape(n, features, out, density, seed):
    check_linear(n, masked((out, features), density, seed))


def test_results_do_not_depend_on_threads_or_on_earlier_calls():
    w = masked((500, 700), 0.3)
    x, dy, threads = randn(300, 700), randn(300, 500), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4, 1):
            torch.set_num_threads(count)
            results.append([])
            for n in (64, 300):  # tiles that two threads share out evenly, and that they do not
                step = dy[:n], x[:n], w.values, *w.csr, *w.csc, True, True, True, key_of(w)
                results[-1] += [ops.csr_linear(x[:n], w.values, *w.csr, None, key_of(w))]
                results[-1] += ops.csr_linear_backward(*step)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_reach_exactly_what_depends_on_them(bad):
    w, x = masked((80, 90), 0.4), randn(33, 90)
    ops.csr_linear(torch.full((64, 90), bad), w.values, *w.csr, None, key_of(w))  # scratch memory full of it
    x[17, 5] = bad
    reached = torch.zeros(33, 80, dtype=torch.bool)
    reached[17] = w.mask[:, 5]
    assert torch.equal(ops.csr_linear(x, w.values, *w.csr, None, key_of(w)).isfinite(), ~reached)


def test_new_values_need_no_new_code():
    w, x = masked((200, 300), 0.3, seed=77), randn(64, 300)
    ops.csr_linear(x, w.values, *w.csr, None, key_of(w))
    before = code_bytes()
    for seed in range(3):
        values = randn(w.values.numel(), seed=seed)
        weight = torch.zeros(200, 300).masked_scatter(w.mask, values)
        check(ops.csr_linear(x, values, *w.csr, None, key_of(w)), x.double() @ weight.double().t())
    assert code_bytes() == before


# ---- keys and the cache -----------------------------------------------------------------------------


def fill_the_cache():
    x, before = randn(64, 700), code_bytes()
    weights = [masked((640, 700), 0.7, seed) for seed in range(40)]  # more than 2 MB of code each
    first = ops.csr_linear(x, weights[0].values, *weights[0].csr, None, key_of(weights[0]))
    for w in weights:
        ops.csr_linear(x, w.values, *w.csr, None, key_of(w))
        assert code_bytes() - before <= CACHE + (1 << 20)  # pages are rounded up
    assert code_bytes() - before > CACHE // 2
    assert torch.equal(first, ops.csr_linear(x, weights[0].values, *weights[0].csr, None, key_of(weights[0])))


def test_the_cache_is_bounded_and_what_it_drops_comes_back():
    alone("fill_the_cache")


@pytest.mark.parametrize("other", [(200, 300), (300, 200), (100, 300)], ids=str)
def test_the_key_of_another_mask_is_noticed(other):
    w, stranger = masked((200, 300), 0.3, seed=1), masked(other, 0.3, seed=2)
    n = w.values.numel()
    if other == (200, 300):  # as many survivors in every row, at other places
        stranger = pack(w.dense.flip(1), w.mask.flip(1))
        assert stranger.values.numel() == n
    x = randn(64, other[1])
    ops.csr_linear(x, stranger.values, *stranger.csr, None, key_of(stranger))
    x = randn(64, 300)
    got = ops.csr_linear(x, w.values, *w.csr, None, key_of(stranger))
    assert torch.equal(got, ops.csr_linear(x, w.values, *w.csr, None))


def test_a_key_of_a_wrong_kind_is_an_error():
    w, x = masked((60, 70), 0.5), randn(64, 70)
    for key in (torch.zeros(2), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"Expected code_key of dtype int64 and shape \[2\] on the CPU"):
            ops.csr_linear(x, w.values, *w.csr, None, key)


def test_unsorted_indices_are_never_compiled():
    w, x = masked((60, 70), 1), randn(64, 70)
    col = w.col.clone()
    col[0], col[1] = int(col[1]), int(col[0])
    before = code_bytes()
    ops.csr_linear(x, w.values, w.crow, col, None, layout.code_key(w.crow, col))
    assert code_bytes() == before


def test_layers_hold_a_key_of_their_mask():
    mask = torch.rand(60, 70, generator=torch.Generator().manual_seed(0)) < 0.4
    layer, twin = SparseLinear(70, 60, mask=mask), SparseLinear(70, 60, mask=mask)
    other = SparseLinear(70, 60, mask=~mask)
    assert torch.equal(layer.code_key, twin.code_key) and not torch.equal(layer.code_key, other.code_key)
    assert "code_key" not in layer.state_dict()
    layer.load_state_dict({"weight_orig": other.weight.detach(), "weight_mask": ~mask, "bias": other.bias.detach()})
    assert torch.equal(layer.code_key, other.code_key)
    assert SparseLinear(70, 60, mask=mask, device="meta").code_key is None
    conv = SparseConv2d(3, 4, 3, mask=torch.ones(4, 3, 3, 3, dtype=torch.bool))
    assert conv.code_key.shape == (2,) and "code_key" not in conv.state_dict()


def test_a_layer_trains_on_machine_code():
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(300, 200, mask=torch.rand(200, 300, generator=generator) < 0.4)
    x = randn(64, 300).requires_grad_()
    y = layer(x)
    index = layer.crow_indices, layer.col_indices
    assert not torch.equal(y, ops.csr_linear(x.detach(), layer.values.detach(), *index, layer.bias.detach()))
    y.square().sum().backward()
    weight, bias = layer.weight.detach().double().requires_grad_(), layer.bias.detach().double()
    x64 = x.detach().double().requires_grad_()
    torch.nn.functional.linear(x64, weight, bias).square().sum().backward()
    assert (x.grad - x64.grad).norm() <= 1e-5 * x64.grad.norm()
    assert (layer.values.grad - weight.grad[layer.survivors()]).norm() <= 1e-5 * weight.grad.norm()


# ---- where it cannot be had -------------------------------------------------------------------------

WITHOUT = """
import ctypes, json, sys
import torch
if sys.argv[2] == "forbid" and ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE: no page becomes executable
    print("cannot forbid"); sys.exit()
sys.path.insert(0, sys.argv[1])
import test_jit as t
from sparsekit import info
w, x = t.masked((200, 300), 0.4), t.randn(64, 300)
before = t.code_bytes()
y = t.ops.csr_linear(x, w.values, *w.csr, None, t.key_of(w))
assert torch.equal(y, t.ops.csr_linear(x, w.values, *w.csr, None))
assert t.code_bytes() == before
t.check_linear(64, w)
assert t.available() in info.render(info.collect())
print(t.available())
"""


@pytest.mark.parametrize(
    "how, environment, reason",
    [
        ("allow", {"SPARSEKIT_JIT": "0"}, "switched off by SPARSEKIT_JIT=0"),
        ("allow", {"SPARSEKIT_ISA": "avx2"}, "needs AVX-512"),
        ("forbid", {}, "the system forbids executable memory"),
    ],
    ids=["switched-off", "isa", "forbidden"],
)
def test_other_kernels_take_over(how, environment, reason):
    command = [sys.executable, "-c", WITHOUT, os.path.dirname(os.path.abspath(__file__)), how]
    done = subprocess.run(command, env={**os.environ, **environment}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "cannot forbid":
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.stdout.strip() == reason
