"""quantize: int8 and bfloat16 survivors behind the same models."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from checks import check, randn
from torch import nn

import sparsekit as sk
from sparsekit import _native, autograd
from sparsekit.nn import QuantizedLinear, chain
from sparsekit.nn import quantized as module

pytestmark = pytest.mark.skipif(_native.lacks_cpu() is not None, reason="the native library is not built")
DTYPES = ["int8", "bfloat16"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def always_faster(monkeypatch):
    """What is measured is not what these tests are about."""
    monkeypatch.setattr(module, "measure", lambda thunks: {name: 9.0 - i for i, name in enumerate(thunks)})


def sparse(sparsity=0.8, bias=True, **kwargs):
    model = nn.Sequential(nn.Linear(200, 70, bias), nn.ReLU(), nn.Linear(70, 64, bias))
    masks = sk.prune(model, sparsity, scope="layer")
    return sk.convert(model, masks, impl="csr", **kwargs).eval()


@each_dtype
def test_results_are_those_of_the_rounded_weights(dtype):
    model = sparse()
    small = sk.quantize(model, dtype)
    x = randn(3, 200)
    with torch.no_grad():
        check(small(x), sk.to_dense(small).double()(x.double()))
        check(small(x.view(3, 1, 200)).view(3, 64), sk.to_dense(small).double()(x.double()))
        assert small(torch.empty(0, 200)).shape == (0, 64)
    for before, after in ((model[0], small[0]), (model[2], small[2])):
        assert torch.equal(after.survivors(), before.survivors())
        weight, exact = after.weight.detach(), before.weight.detach()
        error = float((weight - exact).norm() / exact.norm())
        assert after.error == pytest.approx(error, rel=1e-4) and f"error={error:.2g}" in repr(after)
        step = exact.abs().amax(1, keepdim=True) / 127 if dtype == "int8" else exact.abs() / 128
        assert ((weight - exact).abs() <= step * 0.5001).all()
        assert torch.equal(weight[~before.survivors()], torch.zeros(int((~before.survivors()).sum())))


@each_dtype
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_activations_of_16_bits(dtype, kind):
    small = sk.quantize(sparse(), dtype).to(kind)
    x = randn(2, 200, dtype=kind)
    with torch.no_grad():
        check(small[0](x), F.linear(x.double(), small[0]._weight().double(), small[0].bias.double()), kind)


def test_activations_stay_fused_and_rows_without_survivors_give_the_bias():
    model = sparse()
    with torch.no_grad():
        model[0].values[:] = model[0].pack(model[0].weight.index_fill(0, torch.tensor([0, 5]), 0))
    small = sk.quantize(sk.fuse(model))
    x = randn(2, 200)
    with torch.no_grad():
        assert torch.equal(small[0](x)[:, [0, 5]], model[0].bias[[0, 5]].relu().expand(2, 2))
        check(small(x), sk.to_dense(small).double()(x.double()))


def test_chains_are_taken_apart(monkeypatch):
    monkeypatch.setattr(chain, "measure", lambda thunks: {"apart": 2.0, "chain": 1.0})
    model, x = sparse(), randn(3, 200)
    fused = sk.fuse(model)
    assert type(fused[0]) in chain.LINKED and type(fused[2]) in chain.LINKED
    small = sk.quantize(fused)
    assert isinstance(small[0], QuantizedLinear) and isinstance(small[2], QuantizedLinear)
    check(small(x), sk.to_dense(small).double()(x.double()))
    assert type(fused[0]) in chain.LINKED  # only the copy was
    check(fused(x), sk.to_dense(model).double()(x.double()))


def test_what_stays_of_a_chain_computes_itself(monkeypatch):
    monkeypatch.setattr(chain, "measure", lambda thunks: {"apart": 2.0, "chain": 1.0})
    monkeypatch.setattr(module, "measure", lambda thunks: {name: 1.0 + i for i, name in enumerate(thunks)})
    model, x = sparse(), randn(3, 200)
    kept = sk.quantize(sk.fuse(model), inplace=True)
    assert [type(layer) for layer in (kept[0], kept[2])] == [sk.SparseLinear] * 2
    assert "in one call" not in str(sk.explain(kept))
    check(kept(x), sk.to_dense(model).double()(x.double()))


def test_it_is_smaller_and_explained():
    model = sparse()
    sizes = [sk.explain(m).to_dict()["totals"] for m in (model, sk.quantize(model, "bfloat16"), sk.quantize(model))]
    assert sizes[0]["dense_bytes"] == sizes[1]["dense_bytes"] == sizes[2]["dense_bytes"]
    assert sizes[0]["bytes"] > sizes[1]["bytes"] > sizes[2]["bytes"]
    first = sk.explain(sk.quantize(model)).layers[0]
    assert first.chosen == "lanes int8" and "survivors rounded to int8" in first.note and "csr" in first.rejected


def test_what_is_slower_or_bigger_stays(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda thunks: {name: 1.0 + i for i, name in enumerate(thunks)})
    kept = sk.quantize(sparse())
    assert type(kept[0]) is sk.SparseLinear
    assert "3.00x the time of dense" in sk.explain(kept).layers[0].rejected["lanes int8"]
    mask = torch.zeros(64, 2000, dtype=torch.bool)
    mask[0, ::64] = True  # a step of 64 slots for every survivor
    tiny = sk.SparseLinear(2000, 64, mask=mask)
    assert sk.quantize(tiny) is not tiny and type(sk.quantize(tiny)) is sk.SparseLinear
    assert "the memory of csr" in sk.quantize(tiny).plan.rejected["lanes int8"]


def test_a_copy_is_quantized_and_the_model_is_not():
    model = sparse()
    before = copy.deepcopy(model.state_dict())
    small = sk.quantize(model)
    assert type(model[0]) is sk.SparseLinear and isinstance(small[0], QuantizedLinear)
    x, y = randn(2, 200), small(randn(2, 200))
    assert sk.quantize(model, inplace=True) is model and torch.equal(model(x), y)
    assert torch.equal(sk.masks_of(model)["0.weight"], sk.masks_of(small)["0.weight"])
    twin = copy.deepcopy(small)
    assert torch.equal(twin(x), y) and before.keys() != twin.state_dict().keys()


@each_dtype
def test_state_dicts_bring_values_and_masks(dtype):
    torch.manual_seed(1)
    small, x = sk.quantize(sparse(0.9), dtype), randn(2, 200)
    torch.manual_seed(2)
    other = sk.quantize(sparse(0.7), dtype)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), small(x))
    assert torch.equal(other[0].survivors(), small[0].survivors())


def test_torn_state_is_refused():
    small = sk.quantize(sparse())
    y = small(randn(2, 200))
    for key, change, why in (
        ("0.codes", lambda t: t.fill_(255), "codes of places"),
        ("0.bases", lambda t: t.fill_(10**6), "windows within 200"),
        ("0.scale", lambda t: t[1:], r"a float32 scale \[70\]"),
        ("0.values", lambda t: t.float(), "torch.int8 survivors, got torch.float32"),
        ("2.starts", lambda t: t.flip(0), "starts that ascend"),
    ):
        state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
        state[key] = change(state[key])
        with pytest.raises(RuntimeError, match=f"{key[0]}.values: Expected {why}"):
            small.load_state_dict(state)
        assert torch.equal(small(randn(2, 200))[:, :0], y[:, :0])


def test_errors():
    model = sparse()
    with pytest.raises(ValueError, match="Expected dtype int8 or bfloat16, got 'int4'"):
        sk.quantize(model, "int4")
    with pytest.raises(ValueError, match="Expected a converted model with a sparse linear layer"):
        sk.quantize(nn.Linear(3, 3))
    small = sk.quantize(model)
    with pytest.raises(ValueError, match=r"0: Expected an input of shape \[\.\.\., 200\], got \[2, 70\]"):
        small(randn(2, 70))
    with pytest.raises(RuntimeError, match="0: Expected inference"):
        small(randn(2, 200).requires_grad_())
    with pytest.raises(RuntimeError, match="Expected inference"):
        torch.func.vmap(small)(randn(2, 200))
    with pytest.raises(ValueError, match="0: Expected unrounded survivors, got lanes int8"):
        sk.save(small, "nowhere.safetensors")
    assert not list(small.parameters())


@each_dtype
def test_nodes_in_cxx_give_the_bits_of_python(dtype, monkeypatch):
    small = sk.quantize(sparse(), dtype)[0]
    small.activation, x = "gelu", randn(3, 200)
    fast = [small(x), small(x.view(3, 1, 200)), small(x[0]), small(x[:0])]
    monkeypatch.setattr(autograd, "_cxx", None)
    slow = [small(x), small(x.view(3, 1, 200)), small(x[0]), small(x[:0])]
    assert all(torch.equal(*pair) for pair in zip(fast, slow, strict=True))


def test_export():
    small, x = sk.quantize(sparse()), randn(2, 200)
    with torch.no_grad():
        program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        assert torch.equal(program.module()(randn(5, 200)), small(randn(5, 200)))


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"Expected a model \(a torch.nn.Module\), got OrderedDict"):
        sk.quantize(nn.Linear(4, 4).state_dict())
