"""The native unstructured operators against a dense float64 oracle."""

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


def native_library_is_missing():
    try:
        torch.ops.sparsekit.build_info()
    except (AttributeError, RuntimeError):
        return True
    return False


pytestmark = pytest.mark.skipif(native_library_is_missing(), reason="the native library is not built")

ops = torch.ops.sparsekit
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# ---- helpers ----------------------------------------------------------------------------------------


@dataclass
class Packed:
    """A masked matrix with both of its index structures."""

    dense: torch.Tensor
    mask: torch.Tensor
    values: torch.Tensor
    crow: torch.Tensor
    col: torch.Tensor
    t_crow: torch.Tensor
    t_row: torch.Tensor
    t_perm: torch.Tensor

    @property
    def csr(self):
        return self.crow, self.col

    @property
    def csc(self):
        return self.t_crow, self.t_row, self.t_perm


def pack(weight, mask):
    flat, kept = (weight * mask).flatten(1), mask.flatten(1)

    def pointers(counts):
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()

    order = torch.full(kept.shape, -1, dtype=torch.int32)
    order[kept] = torch.arange(int(kept.sum()), dtype=torch.int32)
    return Packed(
        weight * mask,
        kept,
        flat[kept].contiguous(),
        pointers(kept.sum(1)),
        kept.nonzero()[:, 1].int(),
        pointers(kept.sum(0)),
        kept.t().nonzero()[:, 1].int(),
        order.t()[kept.t()].contiguous(),
    )


def random_packed(shape, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    if density not in (0, 1) and mask.dim() == 2 and min(shape) > 3:
        mask[1] = False  # an empty row
        mask[:, 2] = False  # and an empty column
    return pack(torch.randn(shape, generator=generator).to(dtype), mask)


def linear_oracle(x, w, bias, dy):
    x, dy, w64 = x.double(), dy.double(), w.dense.double()
    y = x @ w64.t() + (bias.double() if bias is not None else 0)
    return y, dy @ w64, (dy.t() @ x)[w.mask], dy.sum(0)


def check_linear(n, w, dtype, bias=True, layout=lambda t: t):
    out, features = w.mask.shape
    x, dy = layout(randn(n, features, dtype=dtype)), layout(randn(n, out, dtype=dtype, seed=2))
    b = randn(out, dtype=dtype, seed=3) if bias else None
    y, dx, dv, db = linear_oracle(x, w, b, dy)
    poison(y.to(dtype), dx.to(dtype), dv.to(dtype))
    check(ops.csr_linear(x, w.values, *w.csr, b), y, dtype)
    check(ops.csr_linear_t(dy, w.values, *w.csc), dx, dtype)
    check(ops.csr_sddmm(dy, x, *w.csr), dv, dtype)
    got = ops.csr_linear_backward(dy, x, w.values, *w.csr, *w.csc, True, True, True)
    for g, e in zip(got, (dx, dv, db), strict=True):
        check(g, e, dtype)


@dataclass(frozen=True)
class Conv:
    channels: int
    out: int
    size: tuple = (9, 11)
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        return self.kernel, self.stride, self.padding, self.dilation, self.groups

    def weight(self, density=0.4, dtype=torch.float32):
        return random_packed((self.out, self.channels // self.groups, *self.kernel), density, dtype)


CONVS = {
    "3x3": Conv(20, 17),
    "1x1": Conv(6, 9, (7, 7), (1, 1), padding=(0, 0)),
    "5x5": Conv(3, 5, (12, 10), (5, 5), padding=(2, 2)),
    "7x7-stride2": Conv(3, 6, (23, 20), (7, 7), (2, 2), (3, 3)),
    "3x3-stride2": Conv(8, 8, (10, 10), stride=(2, 2)),
    "1x1-stride2": Conv(4, 6, (7, 8), (1, 1), (2, 2), (0, 0)),
    "1x1-stride3-padded": Conv(3, 4, (4, 1), (1, 1), (3, 2), (2, 1)),
    "no-square": Conv(4, 3, (9, 14), (5, 3), (2, 1), (0, 2), (1, 2)),
    "dilated": Conv(5, 4, (13, 12), dilation=(3, 2), padding=(3, 2)),
    "much-padding": Conv(2, 3, (4, 5), padding=(5, 4)),
    "valid": Conv(3, 2, (3, 3), padding=(0, 0)),
    "grouped": Conv(12, 8, groups=4),
    "depthwise": Conv(10, 10, groups=10),
    "depthwise-multiplier": Conv(6, 12, stride=(2, 1), groups=6),
    "wide": Conv(2, 3, (3, 150)),
    "one-pixel": Conv(4, 5, (1, 1)),
}


def conv_oracle(conv, x, w, bias, dy):
    x, weight, bias = x.double().requires_grad_(), w.dense.double().requires_grad_(), bias.double().requires_grad_()
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    dy = randn(*y.shape, seed=2) if dy is None else dy
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy.double())
    return y.detach(), dx, dw.flatten(1)[w.mask], db


def check_conv(conv, n, dtype=torch.float32, density=0.4, memory_format=torch.contiguous_format):
    w = conv.weight(density, dtype)
    x = randn(n, conv.channels, *conv.size, dtype=dtype).to(memory_format=memory_format)
    b = randn(conv.out, dtype=dtype, seed=3)
    shape = conv_oracle(conv, x, w, b, None)[0].shape
    dy = randn(*shape, dtype=dtype, seed=2).to(memory_format=memory_format)
    y, dx, dv, db = conv_oracle(conv, x, w, b, dy)
    poison(y.to(dtype), dx.to(dtype), dv.to(dtype))
    plain = ops.csr_conv2d(x, w.values, *w.csr, b, *conv.geometry)
    check(plain, y, dtype)
    for form in (torch.contiguous_format, torch.channels_last):
        skip = randn(*shape, dtype=dtype, seed=6).contiguous(memory_format=form)
        poison(skip)
        got = ops.csr_conv2d(x, w.values, *w.csr, b, *conv.geometry, None, "relu", skip)
        assert torch.equal(got, (plain + skip).relu()) and got.stride() == plain.stride()
    check(ops.csr_conv2d_t(dy, w.values, *w.csc, conv.size, *conv.geometry), dx, dtype)
    check(ops.csr_conv2d_sddmm(dy, x, *w.csr, *conv.geometry), dv, dtype)
    got = ops.csr_conv2d_backward(dy, x, w.values, *w.csr, *w.csc, *conv.geometry, True, True, True)
    for g, e in zip(got, (dx, dv, db), strict=True):
        check(g, e, dtype)


# ---- linear -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 16, 17, 60, 64, 65, 130])
def test_linear_batch_sizes(n, dtype):
    check_linear(n, random_packed((37, 53), 0.3, dtype), dtype)


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 40), (40, 1), (10, 100), (300, 784), (257, 1030), (0, 5), (5, 0)], ids=str
)
def test_linear_shapes(shape, density):
    check_linear(33, random_packed(shape, density), torch.float32)
    check_linear(1, random_packed(shape, density), torch.float32, bias=False)


LAYOUTS = {
    "feature-major": lambda t: t.t().contiguous().t(),
    "every-second": lambda t: torch.stack([t, t + 1], 2)[..., 0],
    "row-slice": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape[0], -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_strides(layout, n, dtype):
    check_linear(n, random_packed((30, 70), 0.3, dtype), dtype, layout=LAYOUTS[layout])


def test_linear_large_batch_is_cut_into_pieces():
    check_linear(4100, random_packed((20, 1100), 0.1), torch.float32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 80), st.integers(1, 90), st.integers(1, 70), st.floats(0, 1), st.integers(0, 9))
def test_linear_any_shape(n, features, out, density, seed):
    check_linear(n, random_packed((out, features), density, seed=seed), torch.float32)


def test_linear_backward_gives_only_what_was_asked():
    w, x, dy = random_packed((6, 9), 0.5), randn(4, 9), randn(4, 6)
    expected = linear_oracle(x, w, None, dy)[1:]
    for asked in range(8):
        needs = [bool(asked & bit) for bit in (1, 2, 4)]
        got = ops.csr_linear_backward(dy, x, w.values, *w.csr, *w.csc, *needs)
        for g, e, need in zip(got, expected, needs, strict=True):
            if need:
                check(g, e)
            else:
                assert g.numel() == 0


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def check_activations(n, w, dtype, *key):
    x, bias = randn(n, w.mask.shape[1], dtype=dtype), randn(w.mask.shape[0], dtype=dtype, seed=3)
    y = linear_oracle(x, w, bias, randn(n, w.mask.shape[0]))[0]
    for name, function in ACTIVATIONS.items():
        poison(y.to(dtype))
        check(ops.csr_linear(x, w.values, *w.csr, bias, *(key or [None]), name), function(y), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 64, 130])
def test_linear_activations(n, dtype):
    check_activations(n, random_packed((37, 253), 0.3, dtype), dtype)


def test_unknown_activation_is_an_error():
    w = random_packed((6, 9), 0.5)
    with pytest.raises(RuntimeError, match="csr_linear: Expected activation none, relu, gelu or silu, got tanh"):
        ops.csr_linear(randn(4, 9), w.values, *w.csr, None, None, "tanh")


# ---- convolution ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 16, 17, 33])
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, n):
    check_conv(CONVS[name], n)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("name", ["3x3", "3x3-stride2", "grouped"])
def test_conv_types_and_formats(name, n, dtype, memory_format):
    check_conv(CONVS[name], n, dtype, memory_format=memory_format)


@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("name", ["3x3", "3x3-stride2", "grouped"])
def test_conv_results_lie_as_their_input_does(name, n):
    conv, w = CONVS[name], CONVS[name].weight()
    for form in (torch.contiguous_format, torch.channels_last):
        x = randn(n, conv.channels, *conv.size).contiguous(memory_format=form)
        y = ops.csr_conv2d(x, w.values, *w.csr, None, *conv.geometry)
        dx = ops.csr_conv2d_backward(y, x, w.values, *w.csr, *w.csc, *conv.geometry, True, True, True)[0]
        assert y.stride() == torch.empty(y.shape).contiguous(memory_format=form).stride()
        assert dx.stride() == x.stride()


@pytest.mark.parametrize("n", [2, 16])
@pytest.mark.parametrize("density", [0, 1])
def test_conv_densities(density, n):
    check_conv(CONVS["3x3"], n, density=density)
    check_conv(Conv(64, 40, (8, 8)), n, density=density)  # enough survivors per row to be tiled


@pytest.mark.parametrize("n", [1, 16])
def test_conv_sliced_input(n):
    conv, w = CONVS["3x3"], CONVS["3x3"].weight()
    x = randn(n, conv.channels, *(2 * s for s in conv.size))[:, :, ::2, ::2]
    expected = F.conv2d(x.double(), w.dense.double(), None, padding=1)
    check(ops.csr_conv2d(x, w.values, *w.csr, None, *conv.geometry), expected)


def test_conv_zero_batch():
    conv, w = CONVS["3x3"], CONVS["3x3"].weight()
    x, dy = randn(0, conv.channels, *conv.size), randn(0, conv.out, *conv.size)
    assert ops.csr_conv2d(x, w.values, *w.csr, None, *conv.geometry).shape == dy.shape
    dx, dv, db = ops.csr_conv2d_backward(dy, x, w.values, *w.csr, *w.csc, *conv.geometry, True, True, True)
    assert dx.shape == x.shape and not dv.any() and not db.any() and dv.shape == w.values.shape


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_conv_any_geometry(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    kernel, dilation = (draw(1, 4), draw(1, 4)), (draw(1, 2), draw(1, 2))
    padding = (draw(0, 3), draw(0, 3))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = tuple(low + draw(0, 9) for low in least)
    channels, out, stride = groups * draw(1, 4), groups * draw(1, 4), (draw(1, 3), draw(1, 3))
    conv = Conv(channels, out, size, kernel, stride, padding, dilation, groups)
    check_conv(conv, draw(1, 18), density=data.draw(st.floats(0, 1)))


# ---- guarantees -------------------------------------------------------------------------------------


def every_result():
    """All results of one linear and some convolutions, large enough to be shared among threads."""
    generator = torch.Generator().manual_seed(0)
    uneven = torch.rand(300, 1030, generator=generator) < torch.linspace(0, 0.2, 300)[:, None] ** 1.5 * 3
    w = pack(torch.randn(300, 1030, generator=generator), uneven)
    yield ops.csr_linear(randn(64, 1030), w.values, *w.csr, None)
    w = random_packed((300, 1030), 0.2)
    x, dy = randn(128, 1030), randn(128, 300)
    yield ops.csr_linear(x, w.values, *w.csr, None)
    yield ops.csr_linear(x[:1], w.values, *w.csr, None)
    for n in (33, 49, 64, 80, 128):  # panels shared out whole, or row by row
        yield from ops.csr_linear_backward(dy[:n], x[:n], w.values, *w.csr, *w.csc, True, True, True)
        yield ops.csr_linear(x[:n], w.values, *w.csr, None)
    yield from ops.csr_linear_backward(dy, x, w.values, *w.csr, *w.csc, True, True, True)
    for n, conv in ((18, Conv(40, 36, (14, 14))), (2, Conv(40, 36, (14, 14))), (2, Conv(24, 24, stride=(2, 2)))):
        w = conv.weight()
        x = randn(n, conv.channels, *conv.size)
        y = ops.csr_conv2d(x, w.values, *w.csr, None, *conv.geometry)
        yield y
        yield from ops.csr_conv2d_backward(y, x, w.values, *w.csr, *w.csc, *conv.geometry, True, True, True)


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results[threads] = list(every_result())
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 4):
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[threads], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_workspaces_do_not_leak_between_calls(bad):
    """A call fills the scratch memory with NaN; the next, smaller one must not see any of it."""
    w, conv = random_packed((200, 300), 0.3), Conv(20, 20, (16, 16))
    ops.csr_linear(torch.full((100, 300), bad), w.values, *w.csr, None)
    ops.csr_sddmm(torch.full((100, 200), bad), torch.full((100, 300), bad), *w.csr)
    k = conv.weight()
    for n in (16, 2):
        x = torch.full((n, 20, 16, 16), bad)
        ops.csr_conv2d_backward(x, x, k.values, *k.csr, *k.csc, *conv.geometry, True, True, True)
    check_linear(17, random_packed((23, 41), 0.3), torch.float32)
    for n in (1, 16, 17):
        check_conv(Conv(5, 7, (6, 5)), n)
        check_conv(CONVS["no-square"], n)


@pytest.mark.parametrize("n", [2, 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_reach_exactly_what_depends_on_them(n, bad):
    w = random_packed((30, 40), 0.3)
    x, dy = randn(n, 40), randn(n, 30)
    x[1, 5] = bad
    reached = torch.zeros(n, 30, dtype=torch.bool)
    reached[1] = w.mask[:, 5]  # a dense product would also spoil the outputs that pruned this input
    assert torch.equal(ops.csr_linear(x, w.values, *w.csr, None).isfinite(), ~reached)
    assert torch.equal(ops.csr_sddmm(dy, x, *w.csr).isfinite(), linear_oracle(x, w, None, dy)[2].isfinite())

    conv = Conv(3, 4, (6, 7))
    k = conv.weight(0.6)
    x = randn(n, 3, *conv.size)
    x[1, 1, 0, 0] = bad  # a corner: only some taps ever meet it
    dy = randn(n, 4, *conv.size)
    dv = conv_oracle(conv, x, k, torch.zeros(4), dy)[2]
    got = ops.csr_conv2d(x, k.values, *k.csr, None, *conv.geometry)
    touched = F.conv2d(x.isfinite().logical_not().double(), (k.dense != 0).double(), None, padding=1) > 0
    assert torch.equal(got.isfinite(), ~touched)
    assert torch.equal(ops.csr_conv2d_sddmm(dy, x, *k.csr, *conv.geometry).isfinite(), dv.isfinite())


def test_build_info():
    info = json.loads(ops.build_info())
    assert info["active_isa"] in info["isa"] and "portable" in info["isa"]
    assert info["version"] and info["schemas"] and info["compiler"]


SELF_CHECK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_csr_ops as t
import json
print(json.loads(t.ops.build_info())["active_isa"])
for dtype in t.DTYPES:
    for n in (1, 5, 70):
        t.check_linear(n, t.random_packed((41, 300), 0.4, dtype), dtype)
        t.check_activations(n, t.random_packed((41, 300), 0.4, dtype), dtype)
    for n in (2, 17):
        for name in ("3x3", "3x3-stride2", "grouped", "no-square"):
            t.check_conv(t.CONVS[name], n, dtype)
"""


def run_with_isa(isa):
    here = os.path.dirname(os.path.abspath(__file__))
    command, env = [sys.executable, "-c", SELF_CHECK, here], {**os.environ, "SPARSEKIT_ISA": isa}
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set(isa):
    done = run_with_isa(isa)
    if "does not support it" in done.stderr or f"{isa} is not one of" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


def test_unknown_instruction_set_is_an_error():
    done = run_with_isa("avx9000")
    assert done.returncode and "SPARSEKIT_ISA=avx9000 is not one of" in done.stderr


# ---- error messages ---------------------------------------------------------------------------------


def linear_arguments():
    w = random_packed((6, 9), 1)
    return {"x": randn(4, 9), "values": w.values, "crow": w.crow, "col": w.col, "bias": randn(6)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": randn(3, 5)}, r"csr_linear: Expected x of shape \[N, 9\].*got \[3, 5\]"),
        ({"x": randn(9)}, r"csr_linear: Expected x of shape \[N, features\], got \[9\]"),
        ({"x": randn(4, 9).int()}, "csr_linear: Expected x of dtype float32"),
        ({"x": randn(4, 9).double()}, "csr_linear: Expected values to have the dtype of x"),
        ({"values": randn(3)}, r"csr_linear: Expected contiguous values of shape \[54\], got \[3\]"),
        ({"bias": randn(7)}, r"csr_linear: Expected bias of shape \[6\], got \[7\]"),
        ({"col": torch.arange(54)}, "csr_linear: Expected col_indices of dtype int32"),
        ({"col": torch.arange(108).int()[::2]}, "csr_linear: Expected contiguous 1-D col_indices"),
        ({"crow": torch.tensor([0, 3]).int()}, "csr_linear: Expected crow_indices to run from 0 to 54"),
    ],
)
def test_linear_errors(change, message):
    with pytest.raises(RuntimeError, match=message):
        ops.csr_linear(*{**linear_arguments(), **change}.values())


def test_linear_backward_errors():
    w = random_packed((6, 9), 1)
    arguments = (w.values, *w.csr, *w.csc, True, True, True)
    with pytest.raises(RuntimeError, match=r"csr_linear_backward: Expected dy of shape \[N, 6\], got \[4, 5\]"):
        ops.csr_linear_backward(randn(4, 5), randn(4, 9), *arguments)
    with pytest.raises(RuntimeError, match="same batch size"):
        ops.csr_linear_backward(randn(3, 6), randn(4, 9), *arguments)
    with pytest.raises(RuntimeError, match=r"Expected x of shape \[N, 9\], got \[4, 10\]"):
        ops.csr_linear_backward(randn(4, 6), randn(4, 10), *arguments)


@pytest.mark.parametrize(
    "conv, x, message",
    [
        (Conv(4, 6), randn(4, 9), r"Expected x of shape \[N, C, H, W\], got \[4, 9\]"),
        (Conv(4, 6), randn(1, 3, 9, 9), "Expected x of more channels"),
        (Conv(4, 6, padding=(0, 0)), randn(1, 4, 2, 9), "Expected an input at least as large as the kernel"),
        (Conv(4, 6, groups=2), randn(1, 5, 9, 9), "divisible by groups = 2"),
        (Conv(4, 6, stride=(0, 1)), randn(1, 4, 9, 9), "Expected stride to be two integers of at least 1"),
    ],
)
def test_conv_errors(conv, x, message):
    w = Conv(4, 6, groups=conv.groups).weight(1)
    with pytest.raises(RuntimeError, match="csr_conv2d: .*" + message):
        ops.csr_conv2d(x, w.values, *w.csr, None, *conv.geometry)


def test_conv_backward_errors():
    conv = Conv(4, 6)
    w = conv.weight(1)
    with pytest.raises(RuntimeError, match=r"Expected dy of shape \[2, 6, 9, 11\], got \[2, 6, 9, 10\]"):
        ops.csr_conv2d_backward(
            randn(2, 6, 9, 10), randn(2, 4, 9, 11), w.values, *w.csr, *w.csc, *conv.geometry, True, True, True
        )
