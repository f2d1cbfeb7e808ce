"""The native convolutions on blocks against a dense float64 oracle."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparsekit as sk
from sparsekit.kernels.blocks import layout


def native_library_is_missing():
    try:
        torch.ops.sparsekit.build_info()
    except (AttributeError, RuntimeError):
        return True
    return not torch._C._dispatch_has_kernel_for_dispatch_key("sparsekit::bsr_conv2d", "CPU")


pytestmark = pytest.mark.skipif(native_library_is_missing(), reason="the native library is not built")

ops = torch.ops.sparsekit
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BLOCKS = [(8, 1), (16, 1), (1, 16), (4, 4), (8, 8), (16, 16), (32, 32)]
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
LAST = torch.channels_last


class Layer(NamedTuple):
    """A convolution in blocks, its weight dense in float64, and both of its index structures."""

    dense: Tensor
    values: Tensor
    block: tuple[int, int]
    index: dict[str, Tensor]
    t: dict[str, Tensor]
    conv: tuple  # stride, padding, dilation, groups

    @property
    def lists(self):
        return self.index["crow_indices"], self.index["col_indices"]

    @property
    def transposed(self):
        return tuple(self.t[name] for name in ("t_crow", "t_row", "t_perm", "t_order"))

    @property
    def inside(self):
        """Of the values, which lie within the weight."""
        return self.gather(torch.ones_like(self.dense)) != 0

    def gather(self, weight):
        return layout.gather(weight, *self.lists, self.block, self.conv[3])

    def y(self, x, bias=None, activation="none"):
        out, kernel = self.dense.shape[0], self.dense.shape[2:]
        order = self.index["row_order"]
        return ops.bsr_conv2d(x, self.values, *self.lists, order, bias, out, kernel, *self.conv, activation)

    def dx(self, dy, x):
        kernel = self.dense.shape[2:]
        return ops.bsr_conv2d_t(dy, self.values, *self.transposed, x.shape[1], x.shape[2:], kernel, *self.conv)

    def dvalues(self, dy, x):
        runs = self.index["runs"]
        return ops.bsr_conv2d_sddmm(dy, x, *self.lists, runs, self.block, self.dense.shape[2:], *self.conv)

    def backward(self, dy, x, *needs):
        index = (*self.lists, self.index["runs"], *self.transposed)
        return ops.bsr_conv2d_backward(dy, x, self.values, *index, self.dense.shape[2:], *self.conv, *needs)

    def oracle(self, x, bias=None, activation="none"):
        bias = None if bias is None else bias.double()
        return ACTIVATIONS[activation](F.conv2d(x.double(), self.dense, bias, *self.conv))

    def gradients(self, dy, x):
        """dx, dvalues, dbias in float64."""
        x, dy = x.double(), dy.double()
        dx = torch.nn.grad.conv2d_input(x.shape, self.dense, dy, *self.conv)
        dw = torch.nn.grad.conv2d_weight(x, self.dense.shape, dy, *self.conv)
        return dx, self.gather(dw), dy.sum((0, 2, 3))


def pair(v):
    return (v, v) if isinstance(v, int) else v


def make(shape, block, density=0.4, stride=1, padding=0, dilation=1, groups=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = layout.grid(torch.Size(shape), block, groups)
    alive = torch.rand(grid.groups * grid.rows, grid.taps * grid.cols, generator=generator) < density
    if 0 < density < 1 and len(alive) > 2:
        alive[1] = False  # an empty row of blocks
    tiles = alive[:, :, None, None].expand(*alive.shape, *block).contiguous()
    mask = layout.unblocks(tiles, torch.Size(shape), groups)
    weight = (torch.randn(shape, generator=generator) * mask).to(dtype)
    index = layout.index(mask, block, groups)
    lists = (index["crow_indices"], index["col_indices"])
    values = layout.gather(weight, *lists, block, groups)
    conv = (pair(stride), pair(padding), pair(dilation), groups)
    return Layer(weight.double(), values, block, index, layout.transposed(*lists, grid), conv)


def poison(*tensors):
    """Leaves NaN in the memory that results of these sizes are likely to be given."""
    for t in tensors:
        torch.full_like(t, float("nan"))


def close(got, expected, dtype, like=None):
    assert got.shape == expected.shape and got.dtype == dtype
    if like is not None:
        last = not like.is_contiguous() and like.is_contiguous(memory_format=LAST)
        assert got.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    scale = max(expected.norm().item(), expected.numel() ** 0.5, 1)
    assert (got.double() - expected).norm().item() <= TOLERANCE[dtype] * scale


def agrees(layer, n, size, activation="none", form=lambda t: t):
    """All three products of a layer, alone and together, against dense float64."""
    dtype = layer.values.dtype
    x = form(randn(n, layer.dense.shape[1] * layer.conv[3], *size, dtype=dtype))
    bias = randn(layer.dense.shape[0], dtype=dtype, seed=3)
    y = layer.oracle(x, bias, activation)
    dy = form(randn(*y.shape, dtype=dtype, seed=2))
    dx, dv, db = layer.gradients(dy, x)
    poison(y.to(dtype), dx.to(dtype), dv.to(dtype))
    close(layer.y(x, bias, activation), y, dtype, x)
    close(layer.dx(dy, x), dx, dtype, dy)
    close(layer.dvalues(dy, x), dv, dtype)
    for got, expected in zip(layer.backward(dy, x, True, True, True), (dx, dv, db), strict=True):
        close(got, expected, dtype)


# ---- results ----------------------------------------------------------------------------------------

GEOMETRIES = [
    ((24, 20, 3, 3), (7, 6), {"padding": 1}),
    ((24, 20, 1, 1), (5, 6), {}),
    ((20, 24, 3, 3), (9, 8), {"stride": 2, "padding": 1}),
    ((20, 24, 1, 1), (9, 8), {"stride": 2}),
    ((17, 19, 5, 5), (11, 9), {"padding": 2}),
    ((33, 18, 7, 7), (13, 12), {"stride": 2, "padding": 3}),
    ((16, 16, 3, 2), (9, 10), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
    ((24, 12, 3, 3), (6, 7), {"padding": 1, "groups": 2}),
    ((36, 8, 3, 3), (6, 7), {"padding": 2, "dilation": 2, "groups": 3}),
    ((16, 1, 3, 3), (6, 7), {"padding": 1, "groups": 16}),
    ((40, 3, 3, 3), (8, 8), {"padding": 1}),
]


@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_geometries(block, case, n):
    shape, size, how = GEOMETRIES[case]
    agrees(make(shape, block, **how), n, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 2, 16])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_dtypes(block, n, dtype):
    agrees(make((24, 20, 3, 3), block, padding=1, dtype=dtype), n, (5, 6))
    agrees(make((24, 20, 1, 1), block, dtype=dtype), n, (5, 6))


@pytest.mark.parametrize("n", [1, 2, 6, 32])
@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
@pytest.mark.parametrize("block", [(16, 1), (1, 16), (4, 4), (16, 16)], ids=str)
def test_geometries_in_pairs(block, case, n):
    """Channels, and samples, are read two at a time where they are even in number."""
    shape, size, how = GEOMETRIES[case]
    agrees(make(shape, block, dtype=torch.bfloat16, **how), n, size)


@pytest.mark.parametrize("density", [0, 0.1, 1])
@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (1, 40, 3, 3), (40, 1, 1, 1), (70, 33, 3, 3)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_shapes_and_densities(block, shape, density):
    agrees(make(shape, block, density, padding=1), 2, (6, 5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 12])
def test_activations(n, activation):
    for dtype in DTYPES:
        agrees(make((20, 12, 3, 3), (8, 4), padding=1, dtype=dtype), n, (5, 7), activation)
    agrees(make((20, 12, 3, 3), (8, 8), padding=1, groups=2), n, (5, 7), activation)


FORMS = {
    "channels last": lambda t: t.contiguous(memory_format=LAST),
    "every second": lambda t: torch.stack([t, t + 1], 4)[..., 0],
    "a slice": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "a slice of channels last": lambda t: torch.cat([t, t], 1).contiguous(memory_format=LAST)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "rows transposed": lambda t: t.mT.contiguous().mT,
    "odd address": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    "channels last, odd address": lambda t: FORMS["odd address"](t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 3, 16, 24])
def test_memory_formats(n, dtype, form):
    for how in ({"padding": 1}, {"padding": 1, "stride": 2}):
        agrees(make((24, 20, 3, 3), (8, 1), dtype=dtype, **how), n, (9, 21), form=FORMS[form])
        agrees(make((24, 20, 3, 3), (16, 16), dtype=dtype, **how), n, (9, 21), form=FORMS[form])


def test_a_large_batch_is_cut_into_pieces():
    agrees(make((16, 200, 3, 3), (16, 1), 0.02, padding=1), 40, (30, 30))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 18), st.integers(1, 40), st.integers(1, 40), st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.integers(1, 2), st.sampled_from(BLOCKS),
    st.floats(0, 1), st.integers(0, 9),
)  # fmt: skip
def test_any_shape(n, out, inputs, kernel, stride, padding, dilation, groups, block, density, seed):
    shape = (out * groups, inputs, *kernel)
    layer = make(shape, block, density, stride, padding, dilation, groups, seed=seed)
    agrees(layer, n, tuple(dilation * (k - 1) + 1 + seed for k in kernel))


def test_backward_gives_only_what_was_asked():
    layer = make((20, 30, 3, 3), (8, 8), 0.7, padding=1)
    x, dy = randn(4, 30, 5, 5), randn(4, 20, 5, 5)
    expected = layer.gradients(dy, x)
    for asked in range(8):
        needs = [bool(asked & bit) for bit in (1, 2, 4)]
        for g, e, need in zip(layer.backward(dy, x, *needs), expected, needs, strict=True):
            if need:
                close(g, e, torch.float32)
            else:
                assert g.shape == (0,)


# ---- guarantees -------------------------------------------------------------------------------------


def every_result():
    """Results large enough to be shared among threads."""
    for block, dtype in [*((b, torch.float32) for b in BLOCKS), ((8, 1), torch.bfloat16), ((16, 16), torch.bfloat16)]:
        layer = make((64, 70, 3, 3), block, 0.2, padding=1, dtype=dtype)
        for n in (1, 16):
            x, dy = randn(n, 70, 14, 14, dtype=dtype), randn(n, 64, 14, 14, dtype=dtype)
            yield layer.y(x, None, "gelu")
            yield layer.y(x.contiguous(memory_format=LAST), None, "gelu").contiguous()
            yield from layer.backward(dy, x, True, True, True)


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


def test_memory_formats_give_equal_bits():
    for block, dtype in (((8, 1), torch.float32), ((8, 1), torch.bfloat16), ((8, 8), torch.bfloat16)):
        for n in (1, 16):
            layer, x = make((24, 20, 3, 3), block, padding=1, dtype=dtype), randn(n, 20, 9, 9, dtype=dtype)
            assert torch.equal(layer.y(x), layer.y(x.contiguous(memory_format=LAST)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_sticks_out_has_no_gradient_and_no_effect(dtype, block, n, bad):
    """Groups of 12 channels: what sticks out of one overlaps the next."""
    layer = make((24, 12, 3, 3), block, 1, padding=1, groups=2, dtype=dtype)
    x, dy = randn(n, 24, 4, 5, dtype=dtype), randn(n, 24, 4, 5, dtype=dtype)
    y, dx = layer.y(x), layer.dx(dy, x)
    for mine, other in ((slice(0, 12), slice(12, 24)), (slice(12, 24), slice(0, 12))):
        x_, dy_ = x.clone(), dy.clone()
        x_[:, other], dy_[:, other] = bad, bad
        assert torch.equal(layer.y(x_)[:, mine], y[:, mine])
        assert torch.equal(layer.dx(dy_, x)[:, mine], dx[:, mine])
    grad = layer.dvalues(torch.full_like(dy, bad), torch.full_like(x, bad))
    assert torch.equal(grad != 0, layer.inside)
    assert torch.equal(grad.isfinite(), ~layer.inside)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [2, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nonfinite_values_reach_exactly_what_depends_on_them(dtype, n, bad):
    """At the edge of an image in a small batch; the sums of a large one also meet the padding there."""
    edge = n == 2
    for block in BLOCKS:
        layer = make((36, 40, 3, 3), block, 0.3, padding=1, dtype=dtype)
        x, dy = randn(n, 40, 6, 5, dtype=dtype), randn(n, 36, 6, 5, dtype=dtype)
        in_x, in_dy = (1, 39, 2, 4 if edge else 2), (0, 35, 5 if edge else 3, 0 if edge else 3)
        x[in_x], dy[in_dy] = bad, bad
        ones = layer._replace(dense=(layer.dense != 0).double())
        reached, back, sampled = ones.oracle(at(x.shape, in_x)), *ones.gradients(at(dy.shape, in_dy), at(x.shape))[:2]
        sampled = sampled + ones.gradients(at(dy.shape), at(x.shape, in_x))[1]
        assert torch.equal(layer.y(x).isfinite(), reached == 0)
        assert torch.equal(layer.dx(dy, x).isfinite(), back == 0)
        assert torch.equal(layer.dvalues(dy, x).isfinite(), (sampled == 0) | ~layer.inside)


def at(shape, place=None):
    """1 at one place, or everywhere."""
    t = torch.ones(shape) if place is None else torch.zeros(shape)
    if place is not None:
        t[place] = 1
    return t


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_workspaces_do_not_leak_between_calls(bad):
    """A call fills the scratch memory with NaN; the next, smaller one must not see any of it."""
    for block in BLOCKS:
        for n in (1, 16):
            layer = make((64, 70, 3, 3), block, padding=1)
            layer.y(torch.full((n, 70, 14, 14), bad))
            layer.backward(torch.full((n, 64, 14, 14), bad), torch.full((n, 70, 14, 14), bad), True, True, True)
            agrees(make((24, 20, 3, 3), block, padding=1), n, (5, 6))
            agrees(make((24, 20, 3, 3), block, padding=1, dtype=torch.bfloat16), n, (5, 6))


def test_module_trains_and_serves():
    """From a mask to a step: the layer runs as bsr, its gradients are those of the dense convolution."""
    mask = (randn(4, 12, 3, 3) < 0).repeat_interleave(8, 0)
    dense = torch.nn.Conv2d(12, 32, 3, padding=1)
    with torch.no_grad():
        dense.weight.mul_(mask)
    layer = sk.SparseConv2d.from_dense(dense, mask, "bsr")
    x = torch.randn(3, 12, 8, 8)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module, image in ((dense, inputs[0]), (layer, inputs[1])):
        module(image).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.pack(dense.weight.grad), layer.values.grad, atol=1e-3, rtol=1e-4)


SELF_CHECK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import json
import test_bsr_conv_native as t
print(json.loads(t.ops.build_info())["active_isa"])
for dtype in t.DTYPES:
    for block in t.BLOCKS + [(4, 1), (1, 4), (1, 1), (64, 8)]:
        for n in (1, 16):
            t.agrees(t.make((41, 30, 3, 3), block, padding=1, stride=2, dtype=dtype), n, (7, 8), "gelu")
for block in t.BLOCKS:
    for dtype in (t.torch.float32, t.torch.bfloat16):
        t.test_what_sticks_out_has_no_gradient_and_no_effect(dtype, block, 1, float("inf"))
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
    assert json.loads(ops.build_info())["version"]


# ---- error messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": randn(2, 30, 5)}, r"bsr_conv2d: Expected x of shape \[N, C, H, W\], got \[2, 30, 5\]"),
        ({"x": randn(2, 30, 1, 5)}, "bsr_conv2d: Expected an input at least as large as the kernel"),
        ({"x": randn(2, 8, 5, 5)}, "bsr_conv2d: Expected blocks below place 18, got"),
        ({"x": randn(2, 30, 5, 5).double()}, "bsr_conv2d: Expected values to have the dtype of x"),
        ({"out": 40}, r"bsr_conv2d: Expected crow_indices of shape \[6\], got \[4\]"),
        ({"activation": "tanh"}, "bsr_conv2d: Expected activation none, relu, gelu or silu, got tanh"),
        ({"groups": 7}, "bsr_conv2d: Expected 30 input and 20 output channels to be divisible by groups = 7"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    layer = make((20, 30, 3, 3), (8, 4), 1)
    given_ = {"x": randn(2, 30, 5, 5), "out": 20, "groups": 1, "activation": "none"} | change
    with pytest.raises(RuntimeError, match=message):
        ops.bsr_conv2d(
            given_["x"], layer.values, *layer.lists, layer.index["row_order"], None, given_["out"], (3, 3),
            (1, 1), (0, 0), (1, 1), given_["groups"], given_["activation"],
        )  # fmt: skip


def test_wrong_gradients_are_named():
    layer = make((20, 30, 3, 3), (8, 4), 1)
    x = randn(2, 30, 5, 5)
    with pytest.raises(RuntimeError, match=r"bsr_conv2d_t: Expected dy of shape \[2, 20, 3, 3\], got \[2, 20, 3, 4\]"):
        layer.dx(randn(2, 20, 3, 4), x)
    with pytest.raises(RuntimeError, match="bsr_conv2d_backward: Expected dy to have the dtype of x"):
        layer.backward(randn(2, 20, 3, 3).double(), x, True, True, True)
