"""Linear layers run as one call: the same function, whatever the batch, and only where it is faster."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checks import check, poison, randn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsekit as sk
from sparsekit import _native, _nodes
from sparsekit.autograd import in_cxx_chain
from sparsekit.kernels.csr import layout
from sparsekit.nn import chain
from sparsekit.nn.chain import Done
from sparsekit.nn.fuse import Applied, Shortened, streamline

pytestmark = pytest.mark.skipif(not _native.load(), reason="the native library is not built")

csr_chain = torch.ops.sparsekit.csr_chain


def layers(widths, densities, dtype=torch.float32, coded=True):
    """Masked weights, and the arguments that a chain of them takes after x."""
    dense, parts = [], []
    for i, (inputs, out, density) in enumerate(zip(widths, widths[1:], densities, strict=False)):
        mask = torch.rand(out, inputs, generator=torch.Generator().manual_seed(i)) < density
        weight = randn(out, inputs, dtype=dtype, seed=i) * mask / max(1, mask.sum(1).max()) ** 0.5
        bias = randn(out, dtype=dtype, seed=10 + i) if i % 2 == 0 else None
        index = layout.csr(mask)
        key = layout.code_key(*index.values()) if coded else None
        dense.append((weight, bias))
        parts.append((weight[mask], *index.values(), bias, key, ("relu", "none", "silu", "gelu")[i % 4]))
    return dense, [list(each) for each in zip(*parts, strict=True)]


def oracle(x, dense):
    y = x.double()
    for i, (weight, bias) in enumerate(dense):
        y = F.linear(y, weight.double(), None if bias is None else bias.double())
        y = (F.relu, lambda t: t, F.silu, F.gelu)[i % 4](y)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 33, 60, 200])
def test_against_an_oracle(n, dtype):
    dense, arguments = layers((97, 65, 30, 11), (0.1, 0.5, 1.0), dtype)
    x = randn(n, 97, dtype=dtype, seed=5)
    for given in (x, torch.stack([x, x], 2)[..., 0], x.t().contiguous().t()):  # the last two are not contiguous
        poison(torch.empty(n, 11, dtype=dtype))
        check(csr_chain(given, *arguments), oracle(x, dense), dtype)


def test_empty_rows_and_no_survivors():
    dense, arguments = layers((20, 40, 7), (0.02, 0.0))
    x = randn(37, 20)
    check(csr_chain(x, *arguments), oracle(x, dense))


@pytest.mark.parametrize("n", [40, 64, 300])
def test_machine_code_and_threads_give_the_same(n):
    dense, arguments = layers((512, 512, 512), (0.2, 0.1))
    x, before = randn(n, 512), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(csr_chain(x, *arguments))
            check(results[-1], oracle(x, dense))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    check(csr_chain(x, *layers((512, 512, 512), (0.2, 0.1), coded=False)[1]), oracle(x, dense))


def test_bad_input_is_refused():
    _, arguments = layers((20, 40, 7), (0.5, 0.5))
    with pytest.raises(RuntimeError, match="Expected 40 or more features into layer 1, got 20"):
        csr_chain(randn(3, 20), *[[a[0], a[1]] if i else [a[0], a[1]] for i, a in enumerate(swapped(arguments))])
    with pytest.raises(RuntimeError, match="Expected as many values"):
        csr_chain(randn(3, 20), arguments[0][:1], *arguments[1:])
    with pytest.raises(RuntimeError, match="Expected x of shape"):
        csr_chain(randn(3, 20).bfloat16(), *arguments)


def swapped(arguments):
    """A first layer of 20 outputs in front of one that reads 40 inputs."""
    _, narrow = layers((20, 20), (0.5,))
    return [[small[0], both[1]] for small, both in zip(narrow, arguments, strict=True)]


def net():
    """A converted network, its last layer dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.SiLU(), nn.Linear(32, 10))
    masks = sk.prune(model, 0.9)
    return sk.convert(model.eval(), masks, impl={"1": "csr", "3": "csr", "5": "dense"}), masks


@pytest.fixture
def faster(monkeypatch):
    """Measurements in which the chain wins."""
    monkeypatch.setattr(chain, "measure", lambda thunks: {name: float(name == "apart") + 1 for name in thunks})


def test_fuse_links_what_follows_each_other(faster):
    sparse, masks = net()
    fused = sk.fuse(sparse)
    assert [isinstance(fused[i], Done) for i in (1, 3, 5)] == [False, True, True]
    assert type(fused) is Shortened and type(sparse) is nn.Sequential
    x = torch.randn(60, 8, 8)
    with torch.no_grad():
        for given in (x, x[:1], x[:0], x.double()):
            wanted = copy.deepcopy(sparse).to(given.dtype)(given)
            torch.testing.assert_close(copy.deepcopy(fused).to(given.dtype)(given), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"1: Expected an input of shape \[..., 64\], got \[60, 65\]"):
            fused(torch.randn(60, 65))
    for name, mask in sk.masks_of(fused).items():
        assert torch.equal(mask, masks[name])
    dense = sk.to_dense(fused)
    assert [type(module) for module in dense] == [type(module) for module in sk.to_dense(sparse)]
    assert type(dense) is nn.Sequential
    for name, tensor in sk.to_dense(sparse).state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor)


def relus(dtype=torch.float32):
    """A converted network in training, ReLU between its layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False), nn.ReLU(), nn.Linear(32, 10))
    return sk.convert(model.to(dtype), sk.prune(model, 0.8), training=True, impl="csr")


@pytest.mark.parametrize("n", [0, 1, 60])
@pytest.mark.parametrize("inner", [False, True])
def test_a_chain_trains_as_its_layers_do(faster, n, inner):
    sparse = relus()
    fused = sk.fuse(sparse)
    assert isinstance(fused[2], Done)
    x = torch.randn(n, 64, requires_grad=inner)
    wanted, got = ([x] * inner + list(m.parameters()) for m in (sparse, fused))
    results = [torch.autograd.grad(m(x).square().sum(), w) for m, w in ((sparse, wanted), (fused, got))]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    for model in (sparse, fused):
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(3):
            model(x.detach()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(sparse.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_gradients_of_a_chain(faster):
    fused = sk.fuse(relus(torch.float64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *rest: fused(x), (x, *fused.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *rest: fused(x), (x, *fused.parameters()), fast_mode=True)


def test_frozen_layers_get_no_gradient(faster):
    fused = sk.fuse(relus())
    fused[0].requires_grad_(False)
    fused[4].bias.requires_grad_(False)
    fused(torch.randn(5, 64)).square().sum().backward()
    assert fused[0].values.grad is None and fused[4].bias.grad is None
    assert fused[2].values.grad is not None and fused[4].values.grad is not None


def test_gradients_and_other_formats_take_the_layers(faster):
    sparse, _ = net()
    fused, x = sk.fuse(sparse), torch.randn(60, 8, 8)
    wanted = torch.autograd.grad(sparse(x).square().sum(), list(sparse.parameters()))
    sparse[5].set_format("csr")
    got = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
    assert got[-2].shape == sparse[5].values.shape
    for one, other in zip(got[:-2], wanted[:-2], strict=True):
        torch.testing.assert_close(one, other)
    fused[3].set_format("dense")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), sparse(x))


def test_a_chain_sees_changed_values_and_masks(faster):
    sparse, _ = net()
    fused, x = sk.fuse(sparse), torch.randn(60, 8, 8)
    with torch.no_grad():
        for model in (sparse, fused):
            model[1].values.mul_(2)
            model[3].load_state_dict({"weight_orig": torch.ones(32, 48), "weight_mask": torch.eye(32, 48),
                                      "bias": torch.zeros(32)})  # fmt: skip
        torch.testing.assert_close(fused(x), sparse(x))


def test_explain_tells_what_runs_in_one_call(faster):
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    sparse = sk.convert(model, sk.prune(model, 0.9), torch.randn(16, 64), impl="csr")
    assert "0, 2 run in one call, 1.0 us for 2.0" in str(sk.explain(sk.fuse(sparse)))


def test_a_streamlined_training_has_the_bits_of_its_layers(faster):
    sparse, twin = relus(), relus()
    streamline(twin)
    assert isinstance(twin[2], Done) and all(isinstance(twin[i], Applied) for i in (1, 3))
    for model in (sparse, twin):
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(5):
            model(randn(60, 64, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(sparse.state_dict().items(), twin.state_dict().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    with torch.no_grad():
        assert torch.equal(sparse(randn(60, 64)), twin(randn(60, 64)))
    mixed, _ = net()
    streamline(mixed.train())
    assert mixed[5].format.name == "dense" and type(mixed[5]) is sk.SparseLinear and isinstance(mixed[3], Done)


def test_slower_chains_stay_apart(monkeypatch):
    monkeypatch.setattr(chain, "measure", lambda thunks: dict.fromkeys(thunks, 1.0))
    assert not any(isinstance(module, Done) for module in sk.fuse(net()[0]))


def test_hooks_and_exports_keep_the_layers(faster):
    sparse, _ = net()
    seen = []
    sparse[3].register_forward_hook(lambda *a: seen.append(1))
    fused, x = sk.fuse(sparse), torch.randn(4, 8, 8)
    with torch.no_grad():
        fused(x)
    assert seen and not isinstance(fused[3], Done)
    with torch.no_grad():
        program = torch.export.export(sk.fuse(net()[0]), (x,))
    assert not any("csr_chain" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), net()[0](x))


@pytest.mark.skipif(_nodes.load() is None, reason="the autograd nodes are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_dispatcher_a_chain_has_the_operators_bits(faster, dtype, monkeypatch):
    sparse, _ = net()
    fused = sk.fuse(sparse).to(dtype)
    head = fused[1]
    head.chain[1].bias = None
    inputs = [randn(n, 64, dtype=dtype, seed=n) for n in (0, 1, 17, 60)]
    with torch.no_grad():
        found = [in_cxx_chain(x, head.chain) for x in inputs]
        assert all(torch.equal(fused(x), y) and not y.requires_grad for x, y in zip(inputs, found, strict=True))
        monkeypatch.setattr(chain, "in_cxx_chain", lambda *_: NotImplemented)
        assert all(torch.equal(fused(x), y) for x, y in zip(inputs, found, strict=True))


@pytest.mark.skipif(_nodes.load() is None, reason="the autograd nodes are not built")
def test_what_the_dispatcher_must_see_goes_through_it(faster):
    sparse, _ = net()
    fused, x = sk.fuse(sparse), randn(5, 64)
    layers = fused[1].chain
    with torch.no_grad():
        for other in (x[:, :63], x[None], x.bfloat16(), x.to("meta"), nn.Parameter(x), x.double()):
            accepted = isinstance(in_cxx_chain(other, layers), torch.Tensor)
            assert accepted == isinstance(other, nn.Parameter)
        with pytest.raises(ValueError, match=r"1: Expected an input of shape \[\.\.\., 64\]"):
            fused(x[:, :63])
        with FlopCounterMode(display=False):
            assert in_cxx_chain(x, layers) is NotImplemented
        with torch.profiler.profile() as seen:
            fused(x)
        assert "sparsekit::csr_chain" in {event.name for event in seen.events()}
        layers[0].set_format("bsr")
        assert in_cxx_chain(x, layers) is NotImplemented
    assert in_cxx_chain(x, layers) is NotImplemented
