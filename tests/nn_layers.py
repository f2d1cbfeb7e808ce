"""Small sparse layers in every format, and what the dense layer says of them: shared by the tests of nn."""

import pytest
import torch
from torch import nn

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
