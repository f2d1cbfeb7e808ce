"""Sparse layers under what torch does to modules: devices, dtypes, autocast, compile, export, functional calls."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nn_layers import check, conv, each_format, linear
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekit as sk


@each_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(fmt, dtype):
    layer = linear(fmt=fmt).to(dtype)
    assert {b.dtype for b in layer.buffers()} <= {torch.uint8, torch.int32, torch.int64, torch.bool}
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
