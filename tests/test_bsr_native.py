"""The native operators on blocks against a dense float64 oracle."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from checks import check, poison, randn
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekit  # noqa: F401  (loads the library)
from sparsekit.kernels.blocks import layout


def native_library_is_missing():
    try:
        torch.ops.sparsekit.build_info()
    except (AttributeError, RuntimeError):
        return True
    return not torch._C._dispatch_has_kernel_for_dispatch_key("sparsekit::bsr_linear", "CPU")


pytestmark = pytest.mark.skipif(native_library_is_missing(), reason="the native library is not built")

ops = torch.ops.sparsekit
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BLOCKS = [(8, 1), (16, 1), (1, 16), (4, 4), (8, 8), (16, 16), (32, 32)]
SIDES = (1, 4, 8, 16, 32, 64, 128)
ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


@dataclass
class Packed:
    """A weight in blocks, dense in float64, and both of its index structures."""

    dense: torch.Tensor
    values: torch.Tensor
    block: tuple
    index: dict
    t: dict
    inside: torch.Tensor  # of the values, which lie within the weight

    @property
    def forward(self):
        return self.index["crow_indices"], self.index["col_indices"], self.index["row_order"]

    @property
    def sampled(self):
        return self.index["crow_indices"], self.index["col_indices"], self.index["runs"]

    @property
    def transposed(self):
        return tuple(self.t[name] for name in ("t_crow", "t_row", "t_perm", "t_order"))

    def gather(self, weight):
        return layout.gather(weight, *self.forward[:2], self.block, 1)


def packed(shape, block, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = layout.grid(shape, block)
    alive = torch.rand(grid.rows, grid.cols, generator=generator) < density
    if 0 < density < 1 and min(alive.shape) > 2:
        alive[1] = False  # an empty row of blocks
        alive[:, 2] = False  # and an empty column
    tiles = alive.view(1, -1, 1, 1).expand(1, -1, *block).reshape(grid.rows, grid.cols, *block)
    mask = layout.unblocks(tiles, torch.Size(shape))
    weight = (torch.randn(shape, generator=generator) * mask).to(dtype)
    index = layout.index(mask, block)
    crow, col = index["crow_indices"], index["col_indices"]
    return Packed(
        weight.double(),
        layout.gather(weight, crow, col, block, 1),
        block,
        index,
        layout.transposed(crow, col, grid),
        layout.gather(torch.ones(shape, dtype=torch.bool), crow, col, block, 1),
    )


def oracle(x, w, bias, dy, activation="none"):
    x, dy = x.double(), dy.double()
    y = F.linear(x, w.dense, bias.double() if bias is not None else None)
    return ACTIVATIONS[activation](y), dy @ w.dense, w.gather(dy.t() @ x), dy.sum(0)


def check_linear(n, w, dtype=torch.float32, activation="none", bias=True, form=lambda t: t):
    out, features = w.dense.shape
    x, dy = form(randn(n, features, dtype=dtype)), form(randn(n, out, dtype=dtype, seed=2))
    b = randn(out, dtype=dtype, seed=3) if bias else None
    y, dx, dv, db = oracle(x, w, b, dy, activation)
    poison(y.to(dtype), dx.to(dtype), dv.to(dtype))
    check(ops.bsr_linear(x, w.values, *w.forward, b, out, activation), y, dtype)
    check(ops.bsr_linear_t(dy, w.values, *w.transposed, features), dx, dtype)
    check(ops.bsr_sddmm(dy, x, *w.sampled, w.block), dv, dtype)
    got = ops.bsr_linear_backward(dy, x, w.values, *w.sampled, *w.transposed, True, True, True)
    for g, e in zip(got, (dx, dv, db), strict=True):
        check(g, e, dtype)


# ---- results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7, 16, 17, 48, 64, 65, 130])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_batch_sizes(block, n, dtype):
    check_linear(n, packed((75, 101), block, 0.4, dtype), dtype)
    if dtype == torch.bfloat16:  # features can be read in pairs
        check_linear(n, packed((74, 102), block, 0.4, dtype), dtype)


@pytest.mark.parametrize("rows", SIDES)
@pytest.mark.parametrize("cols", SIDES)
def test_every_block(rows, cols):
    for shape in ((128, 128), (150, 141)):
        w = packed(shape, (rows, cols), 0.6)
        for n in (1, 33):
            check_linear(n, w)
        check_linear(9, packed(shape, (rows, cols), 0.6, torch.float64), torch.float64)
    check_linear(21, packed((150, 142), (rows, cols), 0.6, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("density", [0, 0.1, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (10, 100), (300, 784), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_shapes_and_densities(block, shape, density):
    w = packed(shape, block, density)
    check_linear(33, w)
    check_linear(1, w, bias=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 20])
def test_activations(n, dtype, activation):
    check_linear(n, packed((75, 101), (8, 8), 0.4, dtype), dtype, activation)
    check_linear(n, packed((75, 101), (16, 1), 0.4, dtype), dtype, activation, bias=False)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_far_out(dtype, activation):
    """An identity weight shows the function itself: each value, not only their norm."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-6, 6, 4001), torch.tensor([0.0, 1e-30, -1e-30])])
    x = x.to(dtype)[:, None].expand(-1, 16).contiguous()
    w = packed((16, 16), (16, 16), 1, dtype)
    got = ops.bsr_linear(x, torch.eye(16, dtype=dtype)[None], *w.forward, None, 16, activation)
    expected = ACTIVATIONS[activation](x.double())
    bound = 1e-6 if dtype == torch.float32 else 1e-15
    torch.testing.assert_close(got.double(), expected, rtol=20 * bound, atol=bound)
    nan = ops.bsr_linear(x[:1] * float("nan"), torch.eye(16, dtype=dtype)[None], *w.forward, None, 16, activation)
    assert nan.isnan().all()


FORMS = {
    "feature-major": lambda t: t.t().contiguous().t(),
    "every-second": lambda t: torch.stack([t, t + 1], 2)[..., 0],
    "row-slice": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape[0], -1),
    "odd-address": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    "odd-stride": lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [(16, 1), (1, 16), (8, 8)], ids=str)
def test_strides(block, form, n, dtype):
    check_linear(n, packed((30, 70), block, 0.3, dtype), dtype, form=FORMS[form])


@pytest.mark.parametrize("block", [(16, 1), (1, 16), (8, 8)], ids=str)
def test_large_batch_is_cut_into_pieces(block):
    check_linear(4100, packed((20, 1100), block, 0.1))
    for n in (8201, 8200):
        check_linear(n, packed((20, 1100), block, 0.05, torch.bfloat16), torch.bfloat16)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(1, 80), st.integers(1, 90), st.integers(1, 70), st.sampled_from(BLOCKS), st.floats(0, 1),
    st.integers(0, 9),
)  # fmt: skip
def test_any_shape(n, features, out, block, density, seed):
    check_linear(n, packed((out, features), block, density, seed=seed))


def test_backward_gives_only_what_was_asked():
    w, x, dy = packed((20, 30), (8, 8), 0.7), randn(4, 30), randn(4, 20)
    expected = oracle(x, w, None, dy)[1:]
    for asked in range(8):
        needs = [bool(asked & bit) for bit in (1, 2, 4)]
        got = ops.bsr_linear_backward(dy, x, w.values, *w.sampled, *w.transposed, *needs)
        for g, e, need in zip(got, expected, needs, strict=True):
            if need:
                check(g, e)
            else:
                assert g.shape == (0,)


def test_transposed_list_is_not_read_where_no_input_gradient_is_asked():
    w, x, dy = packed((20, 30), (8, 8), 0.7), randn(4, 30), randn(4, 20)
    crow, col, runs = w.sampled
    got = ops.bsr_linear_backward(dy, x, w.values, crow, col, runs, crow, col, col, col, False, True, True)
    check(got[1], oracle(x, w, None, dy)[2])


# ---- guarantees -------------------------------------------------------------------------------------


def every_result():
    """Results large enough to be shared among threads."""
    for block, dtype in [(b, d) for b in BLOCKS for d in (torch.float32, torch.bfloat16)]:
        w = packed((300, 1030), block, 0.2, dtype)
        x, dy = randn(100, 1030, dtype=dtype), randn(100, 300, dtype=dtype)
        for n in (100, 1):
            yield ops.bsr_linear(x[:n], w.values, *w.forward, None, 300, "gelu")
        yield from ops.bsr_linear_backward(dy, x, w.values, *w.sampled, *w.transposed, True, True, True)


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads] = list(every_result())
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[threads], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [2, 41])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_sticks_out_has_no_gradient_and_no_effect(dtype, block, n, bad):
    """Even where x and dy are not finite: entries outside of the weight are 0 in the gradient, and unread."""
    w = packed((38, 42), block, 1, dtype)
    x, dy = torch.full((n, 42), bad, dtype=dtype), torch.full((n, 38), bad, dtype=dtype)
    for dv in (
        ops.bsr_sddmm(dy, x, *w.sampled, block),
        ops.bsr_linear_backward(dy, x, w.values, *w.sampled, *w.transposed, True, True, True)[1],
    ):
        assert torch.equal(dv != 0, w.inside)
        assert torch.equal(dv.isfinite(), ~w.inside)


@pytest.mark.parametrize("n", [2, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_nonfinite_values_reach_exactly_what_depends_on_them(block, n, bad):
    w = packed((60, 70), block, 0.3)
    x, dy = randn(n, 70), randn(n, 60)
    x[1, 69] = bad
    dy[0, 59] = bad
    reached = torch.zeros(n, 60, dtype=torch.bool)
    reached[1] = w.dense[:, 69] != 0
    assert torch.equal(ops.bsr_linear(x, w.values, *w.forward, None, 60, "none").isfinite(), ~reached)
    dx = torch.zeros(n, 70, dtype=torch.bool)
    dx[0] = w.dense[59] != 0
    assert torch.equal(ops.bsr_linear_t(dy, w.values, *w.transposed, 70).isfinite(), ~dx)
    dense = torch.ones(60, 70, dtype=torch.bool)
    dense[59], dense[:, 69] = False, False
    assert torch.equal(ops.bsr_sddmm(dy, x, *w.sampled, block).isfinite(), w.gather(dense) | ~w.inside)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_workspaces_do_not_leak_between_calls(bad):
    """A call fills the scratch memory with NaN; the next, smaller one must not see any of it."""
    for block in BLOCKS:
        w = packed((200, 300), block, 0.3)
        x, dy = torch.full((100, 300), bad), torch.full((100, 200), bad)
        for n in (100, 1):
            ops.bsr_linear(x[:n], w.values, *w.forward, None, 200, "none")
            ops.bsr_linear_backward(dy[:n], x[:n], w.values, *w.sampled, *w.transposed, True, True, True)
        for n in (1, 17):
            check_linear(n, packed((23, 41), block, 0.5))


SELF_CHECK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import json
import test_bsr_native as t
print(json.loads(t.ops.build_info())["active_isa"])
for dtype in t.DTYPES:
    for block in t.BLOCKS + [(4, 1), (1, 4), (1, 1), (64, 8)]:
        for n in (1, 5, 70):
            t.check_linear(n, t.packed((41, 300), block, 0.4, dtype), dtype, "gelu")
for activation in ("relu", "gelu", "silu"):
    t.test_activations_far_out(torch.float32, activation)
for block in t.BLOCKS:
    t.test_what_sticks_out_has_no_gradient_and_no_effect(torch.bfloat16, block, 40, float("inf"))
"""


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    here = os.path.dirname(os.path.abspath(__file__))
    command, env = [sys.executable, "-c", SELF_CHECK, here], {**os.environ, "SPARSEKIT_ISA": isa}
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    if "does not support it" in done.stderr or f"{isa} is not one of" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_the_operators_are_the_native_ones():
    assert json.loads(ops.build_info())["version"]
    for verb in ("linear", "linear_t", "sddmm", "linear_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekit::bsr_{verb}", "CPU")


# ---- error messages ---------------------------------------------------------------------------------


def arguments():
    w = packed((20, 30), (8, 4), 1)
    names = ("crow", "col", "order")
    return {
        "x": randn(4, 30),
        "values": w.values,
        **dict(zip(names, w.forward, strict=True)),
        "bias": randn(20),
        "out_features": 20,
        "activation": "none",
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": randn(3, 9)}, r"bsr_linear: Expected x of at least 29 features \(8 blocks of 4\), got 9"),
        ({"x": randn(9)}, r"bsr_linear: Expected x of shape \[N, features\], got \[9\]"),
        ({"x": randn(4, 30).int()}, "bsr_linear: Expected x of dtype float32"),
        ({"x": randn(4, 30).double()}, "bsr_linear: Expected values to have the dtype of x"),
        ({"values": randn(3, 8, 4)}, r"bsr_linear: Expected contiguous values of shape \[24, R, C\], got \[3, 8, 4\]"),
        ({"values": randn(24, 8, 3)}, "bsr_linear: Expected blocks of sides 1, 4, 8, 16, 32, 64 or 128, got 8x3"),
        ({"bias": randn(7)}, r"bsr_linear: Expected bias of shape \[20\], got \[7\]"),
        ({"col": torch.arange(24)}, "bsr_linear: Expected col_indices of dtype int32"),
        ({"crow": torch.tensor([0, 3]).int()}, "bsr_linear: Expected crow_indices to run from 0 to 24"),
        ({"out_features": 25}, "bsr_linear: Expected the lists of 25 outputs in blocks of 8, got 3 lists"),
        ({"activation": "tanh"}, "bsr_linear: Expected activation none, relu, gelu or silu, got tanh"),
    ],
)
def test_errors(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.bsr_linear(*{**arguments(), **change}.values())


def test_backward_errors():
    w = packed((20, 30), (8, 8), 1)
    rest = (w.values, *w.sampled, *w.transposed, True, True, True)
    with pytest.raises(RuntimeError, match="bsr_linear_backward: Expected the lists of 7 outputs in blocks of 8"):
        ops.bsr_linear_backward(randn(4, 7), randn(4, 30), *rest)
    with pytest.raises(RuntimeError, match="same batch size"):
        ops.bsr_linear_backward(randn(3, 20), randn(4, 30), *rest)
    with pytest.raises(RuntimeError, match="Expected the lists of 40 inputs in blocks of 8, got 4 lists"):
        ops.bsr_linear_backward(randn(4, 20), randn(4, 40), *rest)
