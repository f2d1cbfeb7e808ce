"""SparseLinear and SparseConv2d as drop-ins: in every format what the dense layer does, and nothing revives."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekit as sk
from sparsekit import format as formats

FORMATS = [name for name in formats.names() if name != "nm"]  # holds 2:4 masks alone: test_nm.py
each_format = pytest.mark.parametrize("fmt", FORMATS)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def linear(out=7, features=9, density=0.4, fmt="csr", bias=True, dtype=torch.float32):
    mask = torch.rand(out, features) < density
    if 0 < density < 1:
        mask[1] = False
        mask[:, 2] = False
    return sk.SparseLinear(features, out, bias, dtype=dtype, mask=mask, format=fmt)


def conv(inputs=4, out=6, kernel=3, fmt="csr", density=0.4, dtype=torch.float32, dead=True, **geometry):
    dense = nn.Conv2d(inputs, out, kernel, **geometry, dtype=dtype)
    mask = torch.rand(dense.weight.shape) < density
    if dead:
        mask[1] = False
        mask[:, -1] = False
    return sk.SparseConv2d.from_dense(dense, mask, fmt)


def poison(*shapes, dtype=torch.float32):
    """Leaves NaN in the memory that results of these sizes are likely to be given."""
    for shape in shapes:
        for _ in range(2):
            torch.full(shape, torch.nan, dtype=dtype)


def close(got, want, dtype):
    assert got.shape == want.shape
    assert got.dtype == dtype
    scale = max(float(want.norm()), want.numel() ** 0.5, 1)
    assert float((got.detach().double() - want).norm()) <= TOLERANCE[dtype] * scale


def check(layer, x, dtype=torch.float32):
    """Forward and all gradients against the dense layer in float64, in memory full of NaN."""
    dense = layer.to_dense().double()
    mask = layer.survivors()
    x64 = x.detach().double().requires_grad_()
    want = dense(x64)
    dy = torch.randn_like(want)
    want.backward(dy)
    x = x.detach().requires_grad_()
    layer.zero_grad()
    poison(want.shape, x.shape, layer.values.shape, dtype=dtype)
    got = layer(x)
    close(got, want.detach(), dtype)
    got.backward(dy.to(dtype))
    close(x.grad, x64.grad, dtype)
    close(layer.values.grad, layer.pack(dense.weight.grad * mask), dtype)
    if layer.bias is not None:
        close(layer.bias.grad, dense.bias.grad, dtype)
    with torch.no_grad():
        close(layer(x.detach()), want.detach(), dtype)


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


# ---- state dicts and copies -------------------------------------------------------------------------


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("make", [linear, conv])
def test_packed_state_moves_between_formats(source, target, make):
    saved, loaded = make(fmt=source), make(fmt=target)
    parameter = loaded.values
    loaded(torch.randn(2, 9) if make is linear else torch.randn(1, 4, 5, 5)).sum().backward()
    assert loaded.load_state_dict(saved.state_dict()).missing_keys == []
    assert torch.equal(loaded.weight, saved.weight) and torch.equal(loaded.survivors(), saved.survivors())
    assert torch.equal(loaded.bias, saved.bias)
    assert loaded.values is parameter and loaded.format.name == target  # an optimizer keeps hold of it
    check(loaded, torch.randn(2, 9) if make is linear else torch.randn(1, 4, 5, 5))


@each_format
def test_dense_state_fills_the_survivors(fmt):
    layer, dense = linear(fmt=fmt), nn.Linear(9, 7)
    mask = layer.survivors().clone()
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.survivors(), mask)
    assert torch.equal(layer.weight, torch.where(mask, dense.weight, 0))


@each_format
def test_pruned_state_brings_its_mask(fmt):
    layer, dense = linear(fmt=fmt), nn.Linear(9, 7)
    torch_prune.random_unstructured(dense, "weight", 0.5)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.survivors(), dense.weight_mask != 0)
    assert torch.equal(layer.weight, dense.weight)


@each_format
def test_loading_keeps_the_dtype_and_learns_no_gradient(fmt):
    layer = linear(fmt=fmt, dtype=torch.bfloat16)
    layer.values.requires_grad_(False)
    layer.load_state_dict(linear(fmt="csr").state_dict())
    assert layer.values.dtype == torch.bfloat16 and not layer.values.requires_grad
    check_forward = layer(torch.randn(2, 9, dtype=torch.bfloat16))
    assert check_forward.dtype == torch.bfloat16


def tear(state, **changes):
    return {name: changes.get(name, tensor) for name, tensor in state.items()}


def torn_states():
    csr, compact, dense = (linear(fmt=fmt).state_dict() for fmt in ("csr", "compact", "dense"))
    col, crow, rows = csr["col_indices"], csr["crow_indices"], compact["rows"]

    def edited(tensor, at, value):
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    wraps = torch.tensor([0, 2**31 - 1, -(2**31), -1, 0, 0, 0, len(col)], dtype=torch.int32)
    wrong_values = dense["values"] + (~dense["mask"]).float()
    return {
        "column too large": (tear(csr, col_indices=edited(col, 0, 9)), r"col_indices in \[0, 9\)"),
        "column negative": (tear(csr, col_indices=edited(col, 0, -1)), r"col_indices in \[0, 9\)"),
        "columns unsorted": (tear(csr, col_indices=col.flip(0)), "ascend within each row"),
        "columns of int64": (tear(csr, col_indices=col.long()), "int32 indices"),
        "rows too few": (tear(csr, crow_indices=crow[:-1]), r"crow_indices \[8\]"),
        "rows beyond the end": (tear(csr, crow_indices=edited(crow, -1, 99)), "ascend from 0"),
        "rows going back": (tear(csr, crow_indices=edited(crow, 1, len(col))), "ascend from 0"),
        "rows that wrap": (tear(csr, crow_indices=wraps), "ascend from 0"),
        "values too few": (tear(csr, values=csr["values"][:-1]), "of one length"),
        "unit too large": (tear(compact, rows=edited(rows, -1, 7)), "rows as ascending int64 indices below 7"),
        "unit twice": (tear(compact, rows=edited(rows, 0, int(rows[1]))), "rows as ascending"),
        "compact values": (tear(compact, values=compact["values"][1:]), "values of shape"),
        "mask of floats": (tear(dense, mask=dense["mask"].float()), "bool mask"),
        "mask too small": (tear(dense, mask=dense["mask"][:-1]), "bool mask"),
        "pruned weights alive": (tear(dense, values=wrong_values), "0 where the mask is False"),
        "no index": ({"values": csr["values"], "bias": csr["bias"]}, "index tensors of one format"),
        "mixed index": (csr | {"rows": rows}, "index tensors of one format"),
        "another shape": ({"weight": torch.ones(9, 7), "bias": csr["bias"]}, r"shape \[7, 9\], got \[9, 7\]"),
        "another mask": (
            {"weight_orig": torch.ones(7, 9), "weight_mask": torch.ones(7, 8), "bias": csr["bias"]},
            r"weight_mask of shape \[7, 9\], got \[7, 8\]",
        ),
    }


@each_format
@pytest.mark.parametrize("name", torn_states())
def test_torn_states_are_refused_whole(fmt, name):
    state, message = torn_states()[name]
    layer = nn.Sequential(linear(fmt=fmt))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=f"0.*{message}"):
        layer.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()}, strict=False)
    after = layer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "0.bias")


@each_format
def test_strict_and_not(fmt):
    layer = nn.Sequential(linear(fmt=fmt), linear(fmt=fmt))
    state = layer.state_dict()
    partial_state = {key: tensor for key, tensor in state.items() if key.startswith("1.")} | {"extra": torch.ones(1)}
    with pytest.raises(RuntimeError, match="Missing key.*0.values"):
        layer.load_state_dict(partial_state)
    result = layer.load_state_dict(partial_state, strict=False)
    assert set(result.missing_keys) == {key for key in state if key.startswith("0.")}
    assert result.unexpected_keys == ["extra"]
    bad = state | {"0.values": torch.ones(1)}
    del bad["1.values"], bad["1.bias"]
    with pytest.raises(RuntimeError, match="1.bias"):  # one layer's trouble does not hide another's
        layer.load_state_dict(bad)


@each_format
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(fmt, how):
    layer = nn.Sequential(conv(fmt=fmt), nn.Flatten(), linear(5, 6 * 9, fmt=fmt))
    x = torch.randn(2, 4, 5, 5)
    layer(x.requires_grad_()).sum().backward()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = nn.Sequential(conv(fmt=fmt), nn.Flatten(), linear(5, 6 * 9, fmt=fmt))
        other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer(x), other(x))
    assert other[0].format is layer[0].format
    with torch.no_grad():
        other[0].values.add_(1)
    assert not torch.equal(layer[0].values, other[0].values)


@each_format
def test_set_format_and_back(fmt):
    layer = conv(fmt="csr")
    weight, parameter = layer.weight.detach().clone(), layer.values
    layer.set_format(fmt)
    assert layer.values is parameter and torch.equal(layer.weight, weight)
    assert layer.state_dict().keys() == conv(fmt=fmt).state_dict().keys()
    check(layer, torch.randn(2, 4, 5, 5))
    layer.set_format("csr")
    assert torch.equal(layer.weight, weight)


# ---- devices, dtypes, transforms --------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(fmt, dtype):
    layer = linear(fmt=fmt).to(dtype)
    assert {b.dtype for b in layer.buffers()} <= {torch.int32, torch.int64, torch.bool}
    check(layer, torch.randn(4, 9, dtype=dtype), dtype)


@each_format
def test_meta(fmt):
    source = conv(fmt=fmt)
    moved = copy.deepcopy(source).to("meta")
    assert moved.values.is_meta and all(buffer.is_meta for buffer in moved.buffers())
    mask = source.survivors()
    made = sk.SparseConv2d(4, 6, 3, mask=mask, format=fmt, device="meta")
    for layer in (moved, made):
        assert layer.values.shape == source.values.shape
        assert layer(torch.empty(2, 4, 6, 5, device="meta")).shape == (2, 6, 4, 3)
        layer.load_state_dict(source.state_dict(), assign=True)
        assert torch.equal(layer.weight, source.weight)
        check(layer, torch.randn(2, 4, 6, 5))
    empty = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    assert torch.equal(empty.weight, source.weight) and torch.equal(empty.survivors(), mask)


@each_format
def test_meta_layers_say_what_they_need(fmt):
    layer = linear(fmt=fmt, bias=False).to("meta")
    with pytest.raises(RuntimeError, match="values: Expected packed survivors and assign=True"):
        layer.load_state_dict(linear(fmt=fmt, bias=False).state_dict())
    with pytest.raises(ValueError, match="weight: Expected a mask that holds data"):
        sk.SparseLinear(9, 7, mask=torch.ones(7, 9, dtype=torch.bool, device="meta"), format=fmt)


@each_format
def test_assign_takes_the_dtype_that_comes(fmt):
    layer = linear(fmt=fmt)
    source = copy.deepcopy(layer).double()
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.values.dtype == torch.float64
    check(layer, torch.randn(3, 9, dtype=torch.float64), torch.float64)


@each_format
def test_autocast(fmt):
    for layer, x in ((linear(fmt=fmt), torch.randn(3, 9)), (conv(fmt=fmt), torch.randn(2, 4, 5, 5))):
        dense = layer.to_dense()
        with torch.autocast("cpu", torch.bfloat16):
            y, want = layer(x), dense(x)
        assert y.dtype == want.dtype == torch.bfloat16
        assert torch.allclose(y.float(), want.float(), rtol=0.05, atol=0.05)
        y.float().square().sum().backward()
        want.float().square().sum().backward()
        assert layer.values.grad.dtype == layer.bias.grad.dtype == torch.float32
        wanted = layer.pack(dense.weight.grad * layer.survivors())
        assert (layer.values.grad - wanted).norm() <= 0.05 * wanted.norm()


def network(fmt):
    return nn.Sequential(
        conv(3, 4, fmt=fmt, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        linear(8, 64, fmt=fmt),
        nn.ReLU(),
        linear(5, 8, fmt=fmt),
    )


def gradients(call, model, x):
    return torch.autograd.grad(call(x).square().sum(), [*model.parameters(), x])


@each_format
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_compile(fmt, warm):
    torch._dynamo.reset()
    model, x = network(fmt), torch.randn(3, 3, 4, 4, requires_grad=True)
    eager = copy.deepcopy(model)
    if warm:
        gradients(model, model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), eager(x), atol=1e-6)
    for got, want in zip(gradients(compiled, model, x), gradients(eager, eager, x), strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(compiled(x[:2]), eager(x[:2]), atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_inductor():
    torch._dynamo.reset()
    model, x = network("csr"), torch.randn(3, 3, 4, 4, requires_grad=True)
    want = gradients(model, model, x)
    for got, one in zip(gradients(torch.compile(model, fullgraph=True), model, x), want, strict=True):
        assert torch.allclose(got, one, atol=1e-5)


@each_format
def test_export_with_any_batch(fmt):
    model, x = network(fmt).eval(), torch.randn(3, 3, 4, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    other = torch.randn(7, 3, 4, 4)
    assert torch.allclose(program.module()(other), model(other), atol=1e-6)


@each_format
def test_functional_call(fmt):
    layer, x = linear(fmt=fmt), torch.randn(2, 9)
    doubled = {name: 2 * parameter.detach() for name, parameter in layer.named_parameters()}
    assert torch.allclose(torch.func.functional_call(layer, doubled, x), 2 * layer(x), atol=1e-6)


@each_format
def test_values_can_be_reparametrized(fmt):
    """torch.nn.utils.parametrize refuses the name of a dict method, the older hooks do not."""
    layer, x = linear(fmt=fmt), torch.randn(2, 9)
    torch_prune.l1_unstructured(layer, "values", 0.5)
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)
    layer(x).sum().backward()
    grad = layer.values_orig.grad
    assert torch.equal(grad[layer.values_mask == 0], torch.zeros(int((layer.values_mask == 0).sum())))
    assert grad.any()


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
