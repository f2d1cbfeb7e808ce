"""The autograd nodes in C++: the bits of Python's, only where nothing watches, only from the right file."""

import copy
import sys
import sysconfig
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import sparsekit as sk
from sparsekit import _native, _nodes, autograd, info
from sparsekit.nn.base import SparseModule

cxx = _nodes.load()
needs_nodes = pytest.mark.skipif(cxx is None, reason="there are no autograd nodes in C++")

CASES = {
    "linear": ((9, 7), {}, (5, 9)),
    "sequences": ((9, 7), {}, (2, 3, 9)),
    "one": ((9, 7), {}, (9,)),
    "nobody": ((9, 7), {}, (0, 9)),
    "no inputs": ((0, 4), {}, (3, 0)),
    "conv": ((4, 6, 3), {"stride": (2, 1), "padding": (1, 2)}, (2, 4, 9, 8)),
    "groups": ((4, 6, (3, 2)), {"groups": 2, "dilation": 2}, (2, 4, 9, 8)),
    "image": ((4, 6, 3), {}, (4, 9, 8)),
    "no images": ((4, 6, 3), {}, (0, 4, 9, 8)),
}


def layer_of(case, bias=True, density=0.4, dtype=torch.float32) -> tuple[SparseModule, torch.Tensor]:
    torch.manual_seed(0)
    sizes, how, shape = CASES[case]
    kind, dense = (sk.SparseConv2d, nn.Conv2d) if len(sizes) == 3 else (sk.SparseLinear, nn.Linear)
    mask = torch.rand(dense(*sizes, **how, device="meta").weight.shape) < density
    return kind(*sizes, **how, bias=bias, mask=mask, dtype=dtype), torch.randn(shape).to(dtype)


def python(monkeypatch):
    monkeypatch.setattr(autograd, "_cxx", None)


def step(layer, x, needs, create_graph=False):
    """The output and every gradient of a step; ``needs``: of x, values, bias."""
    layer = copy.deepcopy(layer)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(needs[0])
    leaves = [x, layer.values, layer.bias]
    for leaf, need in zip(leaves, needs, strict=True):
        if leaf is not None:
            leaf.requires_grad_(need)
    y = layer(x)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    dy = torch.arange(y.numel(), dtype=y.dtype).sin().view(y.shape)
    found = torch.autograd.grad(y, wanted, dy.requires_grad_(create_graph), create_graph=create_graph)
    if create_graph:
        loss = sum(grad.square().sum() for grad in found)
        found += torch.autograd.grad(loss, [*wanted, dy], allow_unused=True)
    return type(y.grad_fn).__name__, [y, *found]


def alike(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


NEEDS = [(x, v, b) for x in (True, False) for v in (True, False) for b in (True, False) if x or v or b]


@needs_nodes
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_python(case, needs, monkeypatch):
    for bias in {True, needs[2]}:
        layer, x = layer_of(case, bias)
        name, got = step(layer, x, needs)
        with monkeypatch.context() as without:
            python(without)
            other, want = step(layer, x, needs)
        alike(got, want)
        assert name != other or case in ("sequences", "one", "image")  # a view of what the node returns


@needs_nodes
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["linear", "conv"])
def test_densities_dtypes_and_strides(case, dtype, density, monkeypatch):
    layer, x = layer_of(case, True, density, dtype)
    inputs = [x, x.transpose(0, 1).contiguous().transpose(0, 1), x.contiguous().flip(0)]
    got = [step(layer, x, (True, True, True))[1] for x in inputs]
    python(monkeypatch)
    for one, x in zip(got, inputs, strict=True):
        alike(one, step(layer, x, (True, True, True))[1])


@needs_nodes
@pytest.mark.parametrize("case", ["linear", "sequences", "conv", "groups"])
def test_gradients_of_gradients(case, monkeypatch):
    layer, x = layer_of(case, dtype=torch.float64)
    _, got = step(layer, x, (True, True, True), create_graph=True)
    leaves = (x.requires_grad_(), layer.values, layer.bias)

    def call(x, values, bias):
        return functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    python(monkeypatch)
    alike(got, step(layer, x.detach(), (True, True, True), create_graph=True)[1])


@needs_nodes
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("case", ["linear", "conv"])
def test_activations(case, activation, monkeypatch):
    layer, x = layer_of(case)
    layer.activation = activation
    results = []
    for _ in range(2):
        results.append(step(layer, x, (True, True, True))[1])
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                results[-1].append(layer(x).clone())
        python(monkeypatch)
    alike(*results)
    layer.activation = "tanh"
    with pytest.raises(ValueError, match="Expected an activation of none, relu, gelu, silu, got 'tanh'"):
        layer(x)


class Watched(torch.Tensor):
    """A subclass that does nothing of its own."""


def call(layer, x):
    conv = getattr(layer, "_conv", None)
    return cxx.csr(x, layer.values, layer.bias, layer._index(x), layer.shape, conv, "none")


@needs_nodes
@pytest.mark.parametrize("case", ["linear", "conv"])
def test_whoever_watches_gets_python(case):
    layer, x = layer_of(case)
    assert call(layer, x) is not NotImplemented
    assert call(layer, x.as_subclass(Watched)) is NotImplemented
    assert call(layer, x.to("meta")) is NotImplemented
    assert call(layer, x[:0, :1]) is NotImplemented  # Python says what is wrong with it
    with FlopCounterMode(display=False), torch.no_grad():
        assert call(layer, x) is NotImplemented
    with torch.autocast("cpu", torch.bfloat16):
        assert call(layer, x) is NotImplemented
        assert layer(x).dtype == torch.bfloat16
    seen = []
    torch.func.vmap(lambda one: seen.append(call(layer, one)) or one)(x.unsqueeze(0))
    assert seen == [NotImplemented]


@needs_nodes
def test_what_is_no_index_goes_to_python():
    layer, x = layer_of("linear")
    index, shape = layer._index(x), layer.shape
    for wrong in (index[:3], list(index), (*index[:2], None, *index[3:])):
        assert cxx.csr(x, layer.values, None, wrong, shape, None, "none") is NotImplemented
    assert cxx.csr(x, layer.values, None, index, list(shape), None, "none") is NotImplemented
    with pytest.raises(TypeError, match="Expected 7 arguments, got 2"):
        cxx.csr(x, layer.values)
    x.requires_grad_()  # the transposed index is not there
    assert cxx.csr(x, layer.values, None, (*index[:3], None, None, None), shape, None, "none") is NotImplemented


@needs_nodes
def test_the_graph_is_torchs():
    layer, x = layer_of("linear")
    y = layer(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    y = layer(x).sum()
    with torch.no_grad():
        layer.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        layer(x)
    assert packed == [x.shape, layer.values.shape]
    with pytest.raises(TypeError, match=r"SparseLinear: Expected an input of torch.float32 .*, got torch.float64"):
        layer(x.double())


@needs_nodes
def test_a_leaf_has_one_guard_and_holds_no_more():
    leaf, masks = nn.Parameter(torch.zeros(2, 3)), [torch.rand(2, 3) < 0.5 for _ in range(2)]
    held = [sys.getrefcount(leaf), *(mask._use_count() for mask in masks)]
    for mask in (*masks, *masks):
        for _ in range(2):
            autograd.guard(leaf, mask)
        leaf.grad = None
        leaf.sum().backward()
        assert torch.equal(leaf.grad, mask.float()) and mask._use_count() == held[1] + 1
    autograd.guard(leaf, None)
    leaf.grad = None
    leaf.sum().backward()
    assert bool((leaf.grad == 1).all()) and [sys.getrefcount(leaf), *(mask._use_count() for mask in masks)] == held
    with pytest.raises(TypeError, match="Expected a leaf and a mask or None"):
        cxx.guard(leaf, 1)
    ref = weakref.ref(leaf)
    autograd.guard(leaf, masks[0])
    del leaf
    assert ref() is None


def test_the_wrong_file_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(_nodes, "_FOLDER", tmp_path)
    monkeypatch.delenv("SPARSEKIT_CXX_AUTOGRAD", raising=False)
    if not _native.load():
        assert "native library" in _nodes._try_load()[1]
        return
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert ", got none" in _nodes._try_load()[1]
    other = tmp_path / f"_autograd.torch2.12.0{suffix}"
    other.mkdir()  # not even a file
    module, reason = _nodes._try_load()
    path = tmp_path / f"_autograd.torch{torch.__version__}{suffix}"
    assert module is None and reason.startswith(f"Expected {path.name}, got {other.name}")
    path.write_bytes(b"torn")
    module, reason = _nodes._try_load()
    assert module is None and "does not load" in reason


def test_the_switch(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_CXX_AUTOGRAD", "0")
    assert _nodes._try_load() == (None, "switched off by SPARSEKIT_CXX_AUTOGRAD=0")
    monkeypatch.setattr(_nodes, "_found", None)
    facts = info.collect()
    assert facts["autograd_nodes"] == {"loaded": False, "path": None, "reason": _nodes._try_load()[1]}
    assert "Python's, slower on small layers: switched off by SPARSEKIT_CXX_AUTOGRAD=0" in info.render(facts)


@needs_nodes
def test_a_file_of_another_source_is_refused(monkeypatch):
    monkeypatch.setattr(_native, "schema_digest", lambda: "another")
    module, reason = _nodes._try_load()
    assert module is None and "another version of the source" in reason
