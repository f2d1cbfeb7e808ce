"""Layers that the plan leaves dense: torch's own call, and gradients exactly 0 where pruned, however asked for."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import sparsekit as sk
from sparsekit import autograd

SHAPES = {"linear": (20, 10), "large": (1024, 256), "conv": (3, 8)}


def layer_of(kind, seed=0):
    """A dense-format layer, its mask, and an input."""
    torch.manual_seed(seed)
    inner, outer = SHAPES[kind]
    if kind == "conv":
        mask = torch.rand(outer, inner, 3, 3) < 0.5
        return sk.SparseConv2d(inner, outer, 3, mask=mask, format="dense"), mask, torch.randn(2, inner, 9, 8)
    mask = torch.rand(outer, inner) < 0.5
    return sk.SparseLinear(inner, outer, mask=mask, format="dense"), mask, torch.randn(5, inner)


def plain(layer, x, weight):
    return F.conv2d(x, weight, layer.bias) if x.dim() == 4 else F.linear(x, weight, layer.bias)


def wanted(layer, mask, x):
    """The gradient of the masked weight in float64."""
    weight = layer.values.detach().double().requires_grad_()
    bias = layer.bias.detach().double()
    y = F.conv2d(x.double(), weight, bias) if x.dim() == 4 else F.linear(x.double(), weight, bias)
    return torch.autograd.grad(y.square().sum(), weight)[0] * mask


def close(grad, want, mask):
    assert (grad.double() - want).norm() <= 1e-5 * want.norm()
    assert bool((grad[~mask] == 0).all())


def of_backward(layer, x):
    layer.values.grad = None
    layer(x).square().sum().backward()
    return layer.values.grad


def of_grad(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), layer.values)[0]


def of_graph(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), layer.values, create_graph=True)[0]


def of_copy(layer, x):
    layer(x)
    other = copy.deepcopy(layer)
    return of_backward(other, x)


def of_file(layer, x):
    layer(x)
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    return of_backward(torch.load(file, weights_only=False), x)


def of_assigned(layer, x):
    layer(x)
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
    return of_backward(layer, x)


def of_called(layer, x):
    given = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    return torch.autograd.grad(functional_call(layer, given, (x,)).square().sum(), given["values"])[0]


def of_func(layer, x):
    given = {name: p.detach() for name, p in layer.named_parameters()}
    return torch.func.grad(lambda p: functional_call(layer, p, (x,)).square().sum())(given)["values"]


def of_compiled(layer, x):
    layer(x)
    return of_backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)


def of_unseen(layer, x):
    return of_backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)


def of_moved(layer, x):
    layer(x)
    layer.double().float()
    return of_backward(layer, x)


WAYS = (
    of_backward, of_grad, of_graph, of_copy, of_file, of_assigned, of_called, of_func, of_compiled, of_unseen, of_moved,
)  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_reach_survivors_only(way, kind):
    layer, mask, x = layer_of(kind)
    close(way(layer, x), wanted(layer, mask, x), mask)


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_of_gradients(kind):
    layer, mask, x = layer_of(kind)
    grad = of_graph(layer, x)
    twice = torch.autograd.grad(grad.square().sum(), layer.values)[0]
    weight = layer.values.detach().clone().requires_grad_()
    first = torch.autograd.grad(plain(layer, x, weight).square().sum(), weight, create_graph=True)[0] * mask
    want = torch.autograd.grad(first.square().sum(), weight)[0] * mask
    close(twice, want.double(), mask)


def test_the_gradients_of_others_are_left_alone():
    layer, mask, x = layer_of("linear")
    layer(x)
    other = nn.Parameter(torch.zeros(10, 20))
    (layer.values + other).sum().backward()
    assert bool((other.grad == 1).all()) and torch.equal(layer.values.grad, mask.float())
    given = torch.ones(10, 20)
    grad = torch.autograd.grad(layer.values, layer.values, given)[0]
    assert bool((given == 1).all()) and torch.equal(grad, mask.float())


def test_batches_of_gradients():
    layer, mask, x = layer_of("linear")
    y = layer(x)
    dy = torch.randn(3, *y.shape)
    want = torch.stack([torch.autograd.grad(y, layer.values, one, retain_graph=True)[0] for one in dy])
    legacy = torch.autograd.grad(y, layer.values, dy, is_grads_batched=True, retain_graph=True)[0]
    mapped = torch.vmap(lambda one: torch.autograd.grad(y, layer.values, one, retain_graph=True)[0])(dy)
    for got in (legacy, mapped):
        assert torch.allclose(got, want, atol=1e-5) and bool((got[:, ~mask] == 0).all())


def test_infinite_gradients_of_pruned_weights_are_zero():
    layer, mask, x = layer_of("linear")
    x[0, 0] = torch.inf
    assert bool((of_backward(layer, x)[~mask] == 0).all())


@pytest.fixture(params=["C++", "Python"])
def where(request, monkeypatch):
    """Where the gradient's hook runs."""
    if request.param == "Python":
        monkeypatch.setattr(autograd, "_cxx", None)
    elif autograd._cxx is None:
        pytest.skip("there are no autograd nodes in C++")
    return request.param


def guards(leaf):
    return sum(isinstance(hook, autograd.Guard) for hook in leaf._backward_hooks.values())


def test_a_gradient_given_as_a_view_is_left_alone(where):
    layer, mask, x = layer_of("linear")
    layer(x)
    given, other = torch.ones(200), nn.Parameter(torch.zeros(10, 20))
    layer.values.view(-1).backward(given)
    assert bool((given == 1).all()) and torch.equal(layer.values.grad, mask.float())
    layer.values.grad, given = None, torch.ones(400)
    torch.cat([layer.values.view(-1), other.view(-1)]).backward(given)
    assert bool((given == 1).all()) and torch.equal(layer.values.grad, mask.float())
    layer.values.grad, given = None, torch.full((20, 10), torch.nan)
    layer.values.t().backward(given)
    assert bool(given.isnan().all()) and torch.equal(layer.values.grad.isnan(), mask)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_hooks_of_users_run_too(when, where):
    layer, mask, x = layer_of("linear")
    shift = float(where == "C++")  # there they run first, whenever they came

    def register():
        return layer.values.register_hook(lambda grad: 2 * grad + shift)

    want = wanted(layer, mask, x)
    if when == "after":
        of_backward(layer, x)
    handle = register() if when != "between" else None
    layer.values.grad = None
    loss = layer(x).square().sum()
    handle = handle or register()
    accumulated = []
    layer.values.register_post_accumulate_grad_hook(lambda leaf: accumulated.append(leaf.grad.clone()))
    loss.backward()
    close(layer.values.grad, (2 * want + shift) * mask, mask)
    assert len(accumulated) == 1 and torch.equal(accumulated[0], layer.values.grad)
    grad = torch.autograd.grad(layer(x).square().sum(), layer.values)[0]
    close(grad, (2 * want + shift) * mask, mask)
    handle.remove()
    close(of_backward(layer, x), want, mask)
    close(of_graph(layer, x), want, mask)


def test_gradients_accumulate(where):
    layer, mask, x = layer_of("linear")
    want = wanted(layer, mask, x)
    for count in (1, 2, 3):
        layer(x).square().sum().backward()
        close(layer.values.grad, count * want, mask)


def test_another_mask_takes_the_place_of_the_first(where):
    layer, first, x = layer_of("linear")
    of_backward(layer, x)
    mask = ~first
    layer.load_state_dict({"weight_orig": torch.randn(10, 20), "weight_mask": mask.float(), "bias": torch.zeros(10)})
    close(of_backward(layer, x), wanted(layer, mask, x), mask)
    assert guards(layer.values) == (where == "Python")
    layer.set_format("csr")
    assert of_backward(layer, x).shape == (int(mask.sum()),)
    layer.set_format("dense")
    close(of_backward(layer, x), wanted(layer, mask, x), mask)


def test_parameters_that_change_places_have_one_guard_each(where):
    layer, mask, x = layer_of("linear")
    sets = [{n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()} for _ in range(2)]
    sets = [{name: nn.Parameter(tensor) for name, tensor in one.items()} for one in sets]
    outputs = [functional_call(layer, one, (x,)) for one in sets * 3]
    for y, one in zip(outputs, sets * 3, strict=True):
        close(torch.autograd.grad(y.square().sum(), one["values"])[0], wanted(layer, mask, x), mask)
    assert all(len(one["values"]._backward_hooks) == (where == "Python") for one in sets)


def test_a_step_is_that_of_torch_but_for_the_mask():
    layer, mask, x = layer_of("linear")
    dense = layer.to_dense()
    assert torch.equal(layer(x), dense(x))
    dense(x).square().sum().backward()
    assert torch.equal(of_backward(layer, x), dense.weight.grad * mask)
    assert torch.equal(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("kind", SHAPES)
def test_errors_name_the_layer(kind):
    layer, _, x = layer_of(kind)
    layer(x)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: Expected an input of shape"):
        layer(x[:, :2])


def test_channels_last_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)).to(memory_format=torch.channels_last)
    masks, x = sk.prune(model, 0.5), torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    fast = sk.convert(model, masks, impl="dense")
    assert fast[0].values.is_contiguous(memory_format=torch.channels_last)
    assert fast[0].survivors().stride() == fast[0].values.stride()
    moved = sk.convert(model, masks, impl="csr")
    moved[0].set_format("dense")
    for net in (moved, sk.to_dense(sk.convert(model, masks, impl="csr"))):
        weight = net[0].values if net is moved else net[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    masked = sk.to_dense(fast)
    assert torch.equal(fast(x), masked(x)) and fast(x).is_contiguous(memory_format=torch.channels_last)
    grads = [torch.autograd.grad(net(x).square().sum(), net[0].parameters()) for net in (fast, masked)]
    assert torch.equal(grads[0][0], grads[1][0] * masks["0.weight"])
    again = copy.deepcopy(fast).to(memory_format=torch.contiguous_format)
    close(of_backward(again[0], x), wanted(again[0], masks["0.weight"], x), masks["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), (300, 410), (3, 4, 5, 2)])
def test_zero_pruned(shape, dtype):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.5
    for grad in (torch.randn(shape), torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))):
        grad = grad.to(dtype)
        grad[~mask] = torch.inf
        want = torch.where(mask, grad, 0)
        torch.ops.sparsekit.zero_pruned_(grad, mask)
        assert torch.equal(grad, want)
    wide = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype)
    torch.ops.sparsekit.zero_pruned_(wide[..., ::2], mask)
    assert bool((wide[..., ::2][~mask] == 0).all()) and bool(wide[..., 1::2].isnan().all())
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.sparsekit.zero_pruned_(grad, mask[:0] if shape[0] else torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 7, 5), (16, 33, 79), (2, 130, 65), (0, 4, 6), (1, 512, 1030)])
def test_dense_sddmm(size, dtype):
    torch.manual_seed(0)
    n, out, inner = size
    for density in (0.0, 0.5, 1.0):
        mask = torch.rand(out, inner) < density
        x, dy = torch.randn(n, 2 * inner, dtype=dtype)[:, ::2], torch.randn(out, n, dtype=dtype).t()
        want = (dy.double().t() @ x.double()) * mask
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            results.append(torch.ops.sparsekit.dense_sddmm(dy, x, mask))
            torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results[1:])
        assert bool((results[0][~mask] == 0).all())
        assert (results[0].double() - want).norm() <= (1e-6 if dtype == torch.float32 else 1e-14) * want.norm()
