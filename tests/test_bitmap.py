"""The bitmap format on its own: what it stores, its twin, what it refuses from outside."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.kernels.bitmap import FORMAT
from sparsekit.kernels.bitmap.reference import bitmap_linear

SHAPE = torch.Size((20, 150))


def packed(shape=SHAPE, density=0.4):
    mask = torch.rand(shape) < density
    index = FORMAT.index(mask)
    return mask, index, FORMAT.gather(torch.randn(shape), index)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 300), st.sampled_from([(), (1, 1), (3, 2)]),
    st.sampled_from([0.0, 0.03, 0.5, 1.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_mask_comes_back(out, inputs, kernel, density, seed):
    torch.manual_seed(seed)
    shape = torch.Size((out, inputs, *kernel))
    mask = torch.rand(shape) < density
    index = FORMAT.index(mask)
    weight = torch.randn(shape).masked_fill(~mask, 0)
    values = FORMAT.gather(weight, index)
    assert FORMAT.check(values, index, shape) is None
    assert torch.equal(FORMAT.survivors(index, shape), mask)
    assert torch.equal(FORMAT.scatter(values, index, shape), weight)


def test_layout_weight_by_weight():
    """The order that kernels rely on, spelled out."""
    mask, index, _ = packed()
    weight = torch.arange(mask.numel(), dtype=torch.float64).view(SHAPE)
    values, bitmap, offsets = FORMAT.gather(weight, index), index["bitmap"], index["offsets"]
    assert bitmap.shape == (3, 19) and bitmap.dtype == torch.int64
    assert offsets.shape == (3 * 2 + 1,) and offsets.dtype == torch.int32
    seen = 0
    for row in range(3):
        for column in range(19):
            if column % 16 == 0:
                assert offsets[row * 2 + column // 16] == seen
            bits = int(bitmap[row, column]) % 2**64
            for bit in range(64):
                place = 8 * row + bit // 8, 8 * column + bit % 8
                inside = place[0] < SHAPE[0] and place[1] < SHAPE[1]
                assert bits >> bit & 1 == int(inside and mask[place])
                if bits >> bit & 1:
                    assert values[seen] == weight[place]
                    seen += 1
    assert offsets[-1] == seen == values.numel()


def test_gradients_of_gather_and_scatter():
    mask, index, values = packed()
    weight = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    FORMAT.gather(weight, index).backward(values.double())
    assert torch.equal(weight.grad, FORMAT.scatter(values.double(), index, SHAPE))
    values = values.double().requires_grad_()
    poisoned = torch.where(mask, torch.randn(SHAPE, dtype=torch.float64), torch.nan)
    FORMAT.scatter(values, index, SHAPE).backward(poisoned)
    assert torch.equal(values.grad, poisoned[mask.nonzero(as_tuple=True)][_order(mask)])


def _order(mask):
    """From row by row of the weight to tile by tile."""
    row, column = mask.nonzero(as_tuple=True)
    key = (row // 8) * 10**6 + (column // 8) * 10**3 + (row % 8) * 10 + column % 8
    return key.argsort()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_twin(dtype, activation, n):
    mask, index, values = packed()
    weight = FORMAT.scatter(values, index, SHAPE).double()
    x, bias = torch.randn(n, SHAPE[1]), torch.randn(SHAPE[0])
    for b in (bias, None):
        want = F.linear(x.double(), weight, None if b is None else b.double())
        want = {"none": want, "relu": want.relu(), "gelu": F.gelu(want), "silu": F.silu(want)}[activation]
        weights = values.to(dtype), index["bitmap"], index["offsets"]
        arguments = (x.to(dtype), *weights, None if b is None else b.to(dtype))
        for function in (bitmap_linear, torch.ops.sparsekit.bitmap_linear):
            got = function(*arguments, SHAPE[0], activation)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=2e-2)


def test_an_unknown_activation_is_refused():
    _, index, values = packed()
    with pytest.raises(ValueError, match="Expected an activation of none, relu, gelu, silu, got 'tanh'"):
        bitmap_linear(torch.randn(2, SHAPE[1]), values, index["bitmap"], index["offsets"], None, SHAPE[0], "tanh")


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_module_trains_and_compiles(density):
    layer = torch.nn.Linear(30, 20)
    mask = torch.rand(20, 30) < density
    sparse = sk.SparseLinear.from_dense(layer, mask, "bitmap")
    dense = sparse.to_dense()
    x = torch.randn(4, 30)
    for call in (sparse, torch.compile(sparse, fullgraph=True, backend="aot_eager")):
        sparse.zero_grad()
        dense.zero_grad()
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = call(ours), dense(theirs)
        torch.testing.assert_close(y, want)
        dy = torch.randn_like(y)
        y.backward(dy)
        want.backward(dy)
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(sparse.values.grad, sparse.pack(dense.weight.grad))
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)


BREAKS = {
    "a bitmap of another dtype": ("bitmap", lambda t: t.to(torch.int32)),
    "offsets of another dtype": ("offsets", lambda t: t.long()),
    "a tile too few": ("bitmap", lambda t: t[:, :-1]),
    "a tile row too few": ("bitmap", lambda t: t[1:]),
    "an offset too few": ("offsets", lambda t: t[:-1]),
    "offsets of other runs": ("offsets", lambda t: torch.cat([t[:1], t[1:] + 1])),
    "offsets that do not start at 0": ("offsets", lambda t: t - 1),
    "offsets that fall": ("offsets", lambda t: t.flip(0)),
    "a bit more": ("bitmap", lambda t: torch.cat([t[:1, :1] ^ 1, t[:1, 1:]], 1).expand(3, -1)),
    "a count of others": ("count", lambda t: t[:, 1:]),
    "a count with data": ("count", lambda t: torch.ones(1, t.shape[1], dtype=t.dtype)),
    "bits below the last row": ("bitmap", lambda t: torch.cat([t[:-1], t[-1:] | 1 << 60])),
    "bits right of the last column": ("bitmap", lambda t: torch.cat([t[:, :-1], t[:, -1:] | 1 << 7], 1)),
}


@pytest.mark.parametrize("what", BREAKS)
def test_tensors_from_outside_are_checked(what):
    _, index, values = packed()
    name, change = BREAKS[what]
    problem = FORMAT.check(values, index | {name: change(index[name])}, SHAPE)
    assert problem and "got" in problem


def test_values_of_another_shape_are_refused():
    _, index, values = packed()
    assert FORMAT.check(values[:-1], index, SHAPE) == f"{values.numel()} values, got {values.numel() - 1}"
    assert "values [survivors]" in FORMAT.check(values[None], index, SHAPE)


def test_who_it_is_for():
    mask = torch.rand(16, 24) < 0.5
    assert FORMAT.unsupported(mask) is None
    assert "not for convolutions" in FORMAT.unsupported(mask.view(16, 24, 1, 1))
    assert FORMAT.absent(torch.device("cpu"), mask) == "no kernel for the CPU"


def test_memory_is_density_and_one_bit():
    layer = torch.nn.Linear(1024, 1024, bias=False).bfloat16()
    sparse = sk.SparseLinear.from_dense(layer, sk.prune(layer, 0.5)["weight"], "bitmap")
    assert sparse.bytes() <= (0.5 + 1 / 16 + 1 / 256) * layer.weight.numel() * 2
