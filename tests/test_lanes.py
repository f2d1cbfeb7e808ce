"""The lanes format on its own: what it stores, its product against a dense oracle, what it refuses from outside."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from checks import check, poison, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekit as sk
from sparsekit import _native, autograd
from sparsekit.kernels.lanes import FORMAT, layout
from sparsekit.kernels.reference import activate

native = pytest.mark.skipif(_native.lacks_cpu() is not None, reason="the native library is not built")
ops = torch.ops.sparsekit


def packed(out, inputs, density=0.2, dtype=torch.float32, uneven=False):
    share = torch.linspace(0, 1, out)[torch.randperm(out), None] ** 3 if uneven else density
    mask = torch.rand(out, inputs) < share
    weight = randn(out, inputs, seed=3).masked_fill(~mask, 0).to(dtype)
    index = FORMAT.index(mask)
    return weight, index, FORMAT.gather(weight, index)


def oracle(x, weight, bias=None, activation="none"):
    return activate(F.linear(x.double(), weight.double(), None if bias is None else bias.double()), activation)


def product(x, values, index, bias, out, activation="none", scale=None):
    return ops.lanes_linear(x, values, *index.values(), scale, bias, out, activation)


# ---- the layout -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 140), st.integers(0, 200), st.sampled_from([(), (1, 1), (3, 2)]),
    st.sampled_from([0.0, 0.03, 0.5, 1.0]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_mask_comes_back(out, inputs, kernel, density, seed):
    torch.manual_seed(seed)
    shape = torch.Size((out, inputs, *kernel))
    mask = torch.rand(shape) < density * torch.rand(out).view(-1, *[1] * (len(shape) - 1)) * 2
    index = FORMAT.index(mask)
    weight = torch.randn(shape).masked_fill(~mask, 0)
    values = FORMAT.gather(weight, index)
    assert FORMAT.check(values, index, shape) is None
    assert torch.equal(FORMAT.survivors(index, shape), mask)
    assert torch.equal(FORMAT.scatter(values, index, shape), weight)
    assert FORMAT.stored(mask) == (values.numel(), "")


def test_layout_slot_by_slot():
    """What the kernel relies on, spelled out."""
    weight, index, values = packed(150, 300, uneven=True)
    codes, bases, starts, order = index.values()
    assert order.numel() == 150 and (weight.count_nonzero(1)[order.long()].diff() <= 0).all()
    seen = torch.zeros_like(weight)
    for group in range(3):
        for step in range(int(starts[group]), int(starts[group + 1])):
            base = int(bases[step])
            assert base + 64 <= 300 and (base % 16 == 0 or base == 300 - 64)
            for lane in range(64):
                code = int(codes[step, lane % 16 * 4 + lane // 16])
                if code == 0:
                    assert values[step, lane] == 0
                    continue
                row, column = int(order[64 * group + lane]), base + code % 32 + (32 if code < 128 else 0)
                assert seen[row, column:].count_nonzero() == 0  # each row from left to right, none twice
                seen[row, column] = values[step, lane]
    assert torch.equal(seen, weight)


def test_rows_are_reordered_only_where_that_saves_steps():
    assert packed(256, 2000, 0.3)[1]["order"].numel() == 0
    assert packed(256, 256, uneven=True)[1]["order"].numel() == 256


def test_gradients_of_gather_and_scatter():
    weight, index, values = packed(70, 90)
    mask = weight != 0
    dense = torch.randn(70, 90, dtype=torch.float64, requires_grad=True)
    FORMAT.gather(dense, index).backward(values.double())
    assert torch.equal(dense.grad, weight.double())
    values = values.double().requires_grad_()
    FORMAT.scatter(values, index, weight.shape).backward(torch.where(mask, 2.0, torch.nan).double())
    place, present = FORMAT._places(index, weight.shape)
    assert torch.equal(values.grad, present.double() * 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v, i: i.update(codes=i["codes"].int()), "uint8 codes and int32 bases"),
        (lambda v, i: i.update(bases=i["bases"][1:]), "as many as bases"),
        (lambda v, i: i.update(starts=i["starts"][1:]), r"starts \[3\]"),
        (lambda v, i: i["starts"].__setitem__(1, 10**6), "starts that ascend"),
        (lambda v, i: i["bases"].__setitem__(0, -16), "windows within"),
        (lambda v, i: i["bases"].__setitem__(-1, 10**6), "windows within"),
        (lambda v, i: i["order"].__setitem__(0, int(i["order"][1])), "an order of 100 rows"),
        (lambda v, i: i["codes"].__setitem__((0, 0), 7), "codes of places"),
        (lambda v, i: i["codes"].__setitem__((0, 0), 0x7F), "codes of places"),
        (lambda v, i: i["codes"].__setitem__((0, 0), 0xFF), "codes of places"),
        (lambda v, i: i["codes"].__setitem__((1, slice(None)), i["codes"][0]), "got others"),
        (lambda v, i: v.masked_fill_(v == 0, 3.0), "0 in slots without a survivor"),
        (lambda v, i: i.update(order=i["order"].flip(0)), "got others"),
    ],
)
def test_parts_from_outside_are_checked(change, why):
    weight, index, values = packed(100, 130, uneven=True)
    assert FORMAT.check(values, index, weight.shape) is None
    index = {name: tensor.clone() for name, tensor in index.items()}
    change(values, index)
    with pytest.raises(AssertionError, match=why):
        assert FORMAT.check(values, index, weight.shape) is None, FORMAT.check(values, index, weight.shape)


# ---- the product ------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (5, 63), (64, 64), (65, 70), (200, 1000), (3, 0), (0, 5)])
def test_product_is_the_dense_one(out, inputs, dtype):
    for n, density, uneven in ((1, 0.2, False), (2, 1.0, False), (3, 0.05, True), (0, 0.2, False), (1, 0.0, False)):
        weight, index, values = packed(out, inputs, density, dtype, uneven)
        x, bias = randn(n, inputs, dtype=dtype), randn(out, dtype=dtype, seed=2)
        for b, activation in ((None, "none"), (bias, "relu"), (bias, "silu")):
            poison(torch.empty(n, out, dtype=dtype))
            check(product(x, values, index, b, out, activation), oracle(x, weight, b, activation), dtype)


@native
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 500), st.integers(0, 5), st.floats(0, 1), st.integers(0, 2**31))
def test_product_of_random_shapes(out, inputs, n, density, seed):
    torch.manual_seed(seed)
    weight, index, values = packed(out, inputs, density, uneven=seed % 2 == 0)
    x = randn(n, inputs, seed=seed)
    check(product(x, values, index, None, out, "gelu"), oracle(x, weight, None, "gelu"))


@native
def test_strided_input():
    weight, index, values = packed(100, 200)
    for x in (randn(200, 3).t(), randn(3, 400)[:, ::2], randn(6, 250)[::2, 7:207], randn(1, 200).expand(3, 200)):
        check(product(x, values, index, None, 100), oracle(x, weight))


@native
def test_infinite_inputs_reach_their_own_rows_only():
    weight, index, values = packed(100, 200, 0.1)
    for column in (0, 33, 199):
        x = randn(1, 200)
        x[0, column] = torch.inf
        y = product(x, values, index, None, 100)
        assert torch.equal(y.isfinite()[0], weight[:, column] == 0)


@native
def test_threads_do_not_change_a_bit():
    weight, index, values = packed(1000, 3000, 0.2)
    x, before = randn(3, 3000), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(product(x, values, index, None, 1000))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0][1:2], product(x[1:2], values, index, None, 1000))  # nor does the batch


@native
@pytest.mark.parametrize("quantized", [torch.int8, torch.bfloat16])
def test_quantized_values(quantized):
    weight, index, values = packed(130, 300, uneven=True)
    scale = torch.rand(130) + 0.5
    small = (values * 20).round().to(quantized)
    dense = FORMAT.scatter(small.float(), index, weight.shape).double() * scale[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = randn(2, 300, dtype=dtype), randn(130, dtype=dtype, seed=2)
        y = product(x, small, index, bias, 130, "relu", scale)
        check(y, oracle(x, dense, bias, "relu"), dtype)
        check(sk.ops.TWINS["lanes_linear"](x.float(), small, *index.values(), scale, None, 130, "none"),
              oracle(x, dense))  # fmt: skip


@native
def test_bad_arguments():
    weight, index, values = packed(100, 200)
    x = randn(2, 200)
    good = {"x": x, "values": values, **index, "scale": None, "bias": None, "out_features": 100, "activation": "none"}

    def refused(why, **other):
        with pytest.raises(RuntimeError, match=f"lanes_linear: {why}"):
            ops.lanes_linear(**good | other)

    refused(r"Expected x of shape \[N, features\], not float64", x=x.double())
    refused(r"Expected x of shape \[N, 2\d\d\] or more features", x=x[:, :100])
    refused("Expected contiguous values of shape", values=values.half())
    refused("Expected contiguous values of shape", values=values[1:])
    refused("Expected contiguous values of shape", values=values.to(torch.int8))
    refused("Expected contiguous uint8 codes", codes=index["codes"].int())
    refused("Expected starts of shape", starts=index["starts"][:-1])
    refused("Expected starts that ascend", starts=index["starts"].flip(0))
    refused("Expected order of shape", order=torch.zeros(3, dtype=torch.int32))
    refused("Expected rows below 100", order=torch.full((100,), 100, dtype=torch.int32))
    refused("Expected contiguous scale", values=values.bfloat16(), scale=torch.ones(3))
    refused("Expected bias of shape", bias=torch.ones(3))
    refused("Expected activation", activation="tanh")


@native
def test_torn_bases_read_no_foreign_memory():
    weight, index, values = packed(64, 128)
    bases = index["bases"].clone()
    bases[:-1] = torch.randint(-(2**31), 2**31 - 1, bases[:-1].shape).int()  # the last one is what a call looks at
    assert product(randn(1, 128), values, index | {"bases": bases}, None, 64).shape == (1, 64)


SELF_CHECK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_lanes as t
for args in ((65, 70), (200, 1000)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        t.test_product_is_the_dense_one(*args, dtype)
t.test_infinite_inputs_reach_their_own_rows_only()
t.test_quantized_values(torch.int8)
t.test_torn_bases_read_no_foreign_memory()
assert (t.FORMAT.absent(torch.device("cpu"), None) is None) == sys.argv[2].startswith("avx512")
layer = t.nn.Linear(70, 65)
fast = t.sk.SparseLinear.from_dense(layer, t.torch.rand(65, 70) < 0.3, "lanes")
t.check(fast(t.randn(2, 70)).detach(), t.oracle(t.randn(2, 70), fast.weight, fast.bias).detach())
"""


@native
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", SELF_CHECK, here, isa],
        env={**os.environ, "SPARSEKIT_ISA": isa, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "does not support it" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr


# ---- in a plan --------------------------------------------------------------------------------------


@native
def test_plans_try_it_for_few_rows_without_gradients():
    model = nn.Sequential(nn.Linear(256, 256))
    masks = sk.prune(model, 0.9)
    reasons = {}
    for rows, training in ((1, False), (16, False), (17, False), (1, True)):
        (plan,) = sk.explain(sk.convert(model, masks, torch.randn(rows, 256), training)).layers
        reasons[rows, training] = "" if plan.chosen == "lanes" else plan.rejected["lanes"]
    beyond = "for inference on up to 16 rows of input at a time"
    if FORMAT.absent(torch.device("cpu"), masks["0.weight"]) is None:
        assert reasons[17, False] == reasons[1, True] == beyond
        assert beyond not in (reasons[1, False], reasons[16, False])


def test_training_step_keeps_what_is_pruned():
    model = nn.Sequential(nn.Linear(100, 70), nn.ReLU(), nn.Linear(70, 10))
    fast = sk.convert(model, sk.prune(model, 0.8), impl="lanes")
    holes = ~fast[0].survivors()
    optimizer = torch.optim.AdamW(fast.parameters(), lr=0.1, weight_decay=0.1)
    x, before = randn(4, 100), fast(randn(4, 100)).detach()
    fast(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(fast[0].weight[holes], torch.zeros(int(holes.sum())))
    assert FORMAT.check(fast[0].values.detach(), fast[0]._saved_index(), torch.Size((70, 100))) is None
    with torch.no_grad():
        after = fast(x)  # nothing of the old weight is left anywhere
        dense = sk.to_dense(fast)
    assert not torch.allclose(before, after)
    check(after, dense.double()(x.double()).detach())


def test_slots():
    assert layout.slots(torch.ones(64, 64, dtype=torch.bool)) == 64 * 64
    assert layout.slots(torch.zeros(64, 64, dtype=torch.bool)) == 0


@native
def test_nodes_in_cxx_give_the_bits_of_python(monkeypatch):
    layer = sk.SparseLinear(90, 70, mask=torch.rand(70, 90) < 0.3, format="lanes")
    layer.activation = "relu"
    x = randn(3, 90)
    with torch.no_grad():
        fast = [layer(x), layer(x.view(3, 1, 90)), layer(x[0]), layer(x[:0])]
        monkeypatch.setattr(autograd, "_cxx", None)
        slow = [layer(x), layer(x.view(3, 1, 90)), layer(x[0]), layer(x[:0])]
    assert all(torch.equal(*pair) for pair in zip(fast, slow, strict=True))
