"""SparseLinear and SparseConv2d as drop-ins: in every format what the dense layer does, and nothing revives."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_layers import FORMATS, TOLERANCE, check, conv, each_format, linear
from torch import nn

import sparsekit as sk

# ---- forward and gradients --------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("density", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize(("n", "out", "features"), [(5, 7, 9), (1, 1, 1), (0, 7, 9), (33, 65, 17), (64, 10, 100)])
def test_linear(fmt, density, n, out, features):
    mask = torch.rand(out, features) < density
    for bias in (True, False):
        check(sk.SparseLinear(features, out, bias, mask=mask, format=fmt), torch.randn(n, features))


@each_format
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(9),
        lambda: torch.randn(2, 3, 9),
        lambda: torch.randn(2, 0, 9),
        lambda: torch.randn(9, 5).t(),
        lambda: torch.randn(5, 18)[:, ::2],
        lambda: torch.randn(1, 9).expand(5, 9),
        lambda: torch.randn(3, 9, 2).transpose(1, 2),
    ],
    ids=["1-D", "3-D", "3-D empty", "transposed", "strided", "expanded", "3-D transposed"],
)
def test_linear_inputs(fmt, make):
    check(linear(fmt=fmt), make())


@each_format
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(fmt, dtype):
    check(linear(fmt=fmt, dtype=dtype), torch.randn(5, 9, dtype=dtype), dtype)
    check(conv(fmt=fmt, dtype=dtype), torch.randn(2, 4, 6, 5, dtype=dtype), dtype)


GEOMETRIES = {
    "plain": {},
    "pointwise": {"kernel": 1},
    "even kernel": {"kernel": (2, 4), "padding": (1, 2)},
    "strided": {"stride": (2, 3), "padding": 1},
    "dilated": {"dilation": (2, 1), "padding": 2},
    "same": {"padding": "same"},
    "same, uneven": {"kernel": (2, 4), "padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "circular, same": {"kernel": 2, "padding": "same", "padding_mode": "circular"},
    "no bias": {"bias": False},
    "full": {"density": 1.1, "dead": False},
    "empty": {"density": 0},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out": 8, "dead": False, "padding": 1},
}


@each_format
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")  # of the dense layer
def test_conv(fmt, name):
    geometry = GEOMETRIES[name]
    if fmt == "compact" and "groups" in geometry:
        pytest.skip("compact runs no groups")
    layer = conv(fmt=fmt, **geometry)
    assert layer.extra_repr().startswith(layer.to_dense().extra_repr().partition(", bias")[0])
    check(layer, torch.randn(2, 4, 7, 8))
    check(layer, torch.randn(0, 4, 7, 8))
    check(layer, torch.randn(2, 4, 8, 7).contiguous(memory_format=torch.channels_last))
    check(layer, torch.randn(2, 4, 16, 7)[:, :, ::2])


@each_format
def test_conv_unbatched(fmt):
    for geometry in ({}, {"padding": 1, "padding_mode": "circular"}):
        layer, x = conv(fmt=fmt, **geometry), torch.randn(4, 6, 5)
        assert torch.equal(layer(x), layer(x[None])[0])
        check(layer, x)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_linear(data):
    size = st.integers(1, 40)
    out, features, n = data.draw(size), data.draw(size), data.draw(st.integers(0, 20))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(out, features) < data.draw(st.floats(0, 1))
    x = torch.randn(n, features)
    for fmt in FORMATS:
        check(sk.SparseLinear(features, out, mask=mask, format=fmt), x)


@each_format
def test_second_derivatives(fmt):
    for layer, size in (
        (linear(3, 4, 0.6, fmt, dtype=torch.float64), (2, 4)),
        (conv(2, 3, 2, fmt, dtype=torch.float64, dead=False, padding=1, stride=2), (1, 2, 3, 3)),
    ):
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)

        def call(x, *parameters, layer=layer):
            # A dense or compact layer takes its gradients at survivors only, so others must not be varied.
            state = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
            state["values"] = layer.pack(layer.format.scatter(state["values"], layer._saved_index(), layer.shape))
            return torch.func.functional_call(layer, state, x)

        arguments = (x, *layer.parameters())
        assert torch.autograd.gradcheck(call, arguments)
        assert torch.autograd.gradgradcheck(call, arguments)  # which skips gradients that have no history
        first = torch.autograd.grad(layer(x).square().sum(), arguments, create_graph=True)
        assert all(grad.requires_grad for grad in first)


@each_format
def test_only_what_is_asked_for_is_differentiated(fmt):
    for layer, x in ((linear(fmt=fmt), torch.randn(3, 9)), (conv(fmt=fmt), torch.randn(2, 4, 5, 5))):
        full = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), [x, layer.values, layer.bias])
        for wanted, tensor in zip(full, [x, layer.values, layer.bias], strict=True):
            for other in (x, layer.values, layer.bias):
                other.requires_grad_(other is tensor)
            (got,) = torch.autograd.grad(layer(x).square().sum(), tensor)
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


# ---- what is pruned stays pruned --------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
}
IMPLEMENTATIONS = [
    (name, how) for name in OPTIMIZERS for how in ("foreach", "fused") if (name, how) != ("rmsprop", "fused")
]


def assert_pruned_are_zero(model, optimizer):
    for layer in model:
        if not isinstance(layer, sk.nn.SparseModule):
            continue
        holes = ~layer.survivors()
        assert torch.equal(layer.weight[holes], torch.zeros(int(holes.sum())))
        held = [layer.values, layer.values.grad, *optimizer.state[layer.values].values()]
        for tensor in held:
            if tensor.shape != layer.values.shape:
                assert tensor.numel() == 1  # a step count
            elif tensor.shape == holes.shape:
                assert torch.equal(tensor[holes], torch.zeros(int(holes.sum())))
            elif layer.format.name in ("csr", "bitmap"):
                assert tensor.numel() == int((~holes).sum())
            elif layer.format.name == "lanes":
                empty = ~layer.format._places(layer._saved_index(), layer.shape)[1]
                assert torch.equal(tensor[empty], torch.zeros(int(empty.sum())))
            elif (inner := layer._buffers["mask"]) is not None:
                assert torch.equal(tensor[~inner], torch.zeros(int((~inner).sum())))


@each_format
@pytest.mark.parametrize(("name", "how"), IMPLEMENTATIONS)
@pytest.mark.parametrize("blow_up", [False, True], ids=["", "inf"])
def test_no_optimizer_revives_a_weight(fmt, name, how, blow_up):
    model = nn.Sequential(conv(3, 4, fmt=fmt, padding=1), nn.ReLU(), nn.Flatten(), linear(5, 64, fmt=fmt))
    before = [layer.survivors().clone() for layer in (model[0], model[3])]
    optimizer = OPTIMIZERS[name](model.parameters(), **{how: True})
    for step in range(4):
        optimizer.zero_grad()
        y = model(torch.randn(6, 3, 4, 4))
        dy = torch.randn_like(y)
        if blow_up and step == 2:
            dy[0, 0] = torch.inf
        y.backward(dy)
        optimizer.step()
        assert_pruned_are_zero(model, optimizer)
    assert all(map(torch.equal, before, (model[0].survivors(), model[3].survivors())))


@each_format
def test_infinite_gradients_reach_survivors_only(fmt):
    for layer, x in ((linear(fmt=fmt), torch.randn(3, 9)), (conv(fmt=fmt), torch.randn(2, 4, 5, 5))):
        y = layer(x)
        y.backward(torch.full_like(y, torch.inf))
        (through_view,) = torch.autograd.grad(layer.weight, layer.values, torch.full(layer.shape, torch.inf))
        for grad in (layer.values.grad, through_view):
            held = layer.format.scatter(torch.ones_like(grad), layer._saved_index(), torch.Size(layer.shape))
            assert torch.equal(held, layer.survivors().float())
            dead = grad[layer.pack(layer.survivors().float()) == 0]
            assert torch.equal(dead, torch.zeros_like(dead))
            assert not grad[layer.pack(layer.survivors().float()) == 1].isfinite().any()


@each_format
def test_weight_is_a_differentiable_view_but_no_door(fmt):
    layer = linear(fmt=fmt)
    coefficients = torch.randn(layer.shape)
    (layer.weight * coefficients).sum().backward()
    assert torch.equal(layer.values.grad, layer.pack(coefficients))
    before = layer.values.detach().clone()
    with torch.no_grad():
        layer.weight.fill_(5)
    assert torch.equal(layer.values, before)


def test_same_initialisation_as_torch():
    for ours, theirs, arguments in (
        (sk.SparseLinear, nn.Linear, (5, 3)),
        (sk.SparseConv2d, nn.Conv2d, (3, 4, (3, 2), 2, 1)),
    ):
        torch.manual_seed(3)
        sparse = ours(*arguments)
        torch.manual_seed(3)
        dense = theirs(*arguments)
        assert torch.equal(sparse.weight, dense.weight) and torch.equal(sparse.bias, dense.bias)
        assert sparse.density == 1


# ---- errors -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*runs as a dense product")
@pytest.mark.parametrize("fmt", [name for name in FORMATS if name not in ("bitmap", "lanes")])  # no convolution
def test_errors_name_the_layer(fmt):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(54, 5))
    masks = {"0.weight": conv(fmt=fmt).survivors(), "2.weight": linear(5, 54).survivors()}
    if fmt == "bsr":
        masks = sk.prune(model, 0.5, pattern="block:8x8", scope="layer")
    model = sk.convert(model, masks, impl=fmt)
    with pytest.raises(ValueError, match=r"^0: Expected an input of shape \[N, 4, H, W\], got \[2, 3, 5, 5\]"):
        model(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"^0: Expected a padded input of at least 3 along axis -1, got 2"):
        model(torch.randn(2, 4, 3, 2))
    with pytest.raises(ValueError, match=r"^2: Expected an input of shape \[\.\.\., 54\], got \[2, 72\]"):
        model(torch.randn(2, 4, 5, 6))
    with pytest.raises(ValueError, match=r"^SparseLinear: Expected an input .*, got \[\]"):
        linear(fmt=fmt)(torch.tensor(1.0))
    for x in (torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.ones(2, 4, 5, 5, dtype=torch.int64)):
        with pytest.raises(TypeError, match=f"^0: Expected an input of torch.float32 .*, got {x.dtype}"):
            model(x)


def test_bad_constructions():
    mask = torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"weight: Expected a mask of shape \[5, 3\], got \[3, 5\]"):
        sk.SparseLinear(3, 5, mask=mask)
    with pytest.raises(TypeError, match="weight: Expected a mask of dtype torch.bool, got torch.float32"):
        sk.SparseLinear(5, 3, mask=mask.float())
    known = "dense, compact, csr, bsr, lanes, panel, bitmap, nm"
    with pytest.raises(ValueError, match=f"Expected a format of {known}, got 'coo'"):
        sk.SparseLinear(5, 3, mask=mask, format="coo")
    with pytest.raises(ValueError, match="SparseConv2d: Expected a format that runs grouped .*, got 'compact'"):
        sk.SparseConv2d(4, 4, 3, groups=2, format="compact")
    grouped = sk.SparseConv2d(4, 4, 3, groups=2, format="csr")
    with pytest.raises(ValueError, match="runs grouped"):
        grouped.set_format("compact")
    check(grouped, torch.randn(1, 4, 5, 5))
    with pytest.raises(TypeError, match="weight: Expected a floating-point weight"):
        sk.SparseLinear(2, 2, dtype=torch.complex64)


def test_functions_take_packed_tensors():
    layer = linear()
    index = tuple(layer._buffers[name] for name in layer.format.index_names)
    x = torch.randn(2, 9)
    y = sk.sparse_linear(x, layer.values, index, layer.shape, layer.format, layer.bias)
    assert torch.allclose(y, F.linear(x, layer.weight, layer.bias), atol=1e-6)
