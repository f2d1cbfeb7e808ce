"""What the tests of the 2:4 format share: masks, layers, and comparisons with the dense layer in float64."""

import torch
from hypothesis import settings
from torch import nn

import sparsekit as sk
from sparsekit.pattern import Pattern
from sparsekit.transposable import transposable_2_4

few = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HALF = (torch.float16, torch.bfloat16)
NM = Pattern.parse("2:4")
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": (2, 3)},
    "padded": {"padding": (2, 1)},
    "both": {"stride": 2, "padding": 1, "bias": False},
    "same": {"padding": "same"},
}

ops = torch.ops.sparsekit


def mask_24(out, inputs, kernel=(), holes=False):
    """A random 2:4 mask; with ``holes`` a quarter of its survivors are pruned too."""
    scores = torch.rand(out, inputs, *kernel)
    alive = torch.rand(scores.shape) < 0.75 if holes else torch.ones(scores.shape, dtype=torch.bool)
    return NM.nm_mask(scores, alive) if scores.numel() else alive


def holds(mask):
    return mask.numel() == 0 or NM.holds(mask)


def transposable(out, inputs):
    return transposable_2_4(torch.rand(out, inputs))


def close(got, want, dtype):
    assert got.shape == want.shape
    assert got.dtype == dtype
    scale = max(float(want.norm()), want.numel() ** 0.5, 1)
    assert float((got.detach().double() - want).norm()) <= TOLERANCE[dtype] * scale


def poison(*shapes, dtype=torch.float32, device="cpu"):
    """Leaves NaN in the memory that results of these sizes are likely to be given."""
    for shape in shapes:
        torch.full(shape, torch.nan, dtype=dtype, device=device)


def check_module(layer, x, dtype):
    """Forward and all gradients against the dense layer in float64."""
    dense, mask = layer.to_dense().double(), layer.survivors()
    x = x.detach().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    want = dense(x64)
    dy = torch.randn_like(want).to(dtype)
    want.backward(dy.double())
    poison(want.shape, x.shape, dtype=dtype, device=x.device)
    y = layer(x)
    layer.zero_grad()
    y.backward(dy)
    close(y, want.detach(), dtype)
    close(x.grad, x64.grad, dtype)
    close(layer.values.grad, layer.pack(dense.weight.grad), dtype)
    if layer.bias is not None:
        close(layer.bias.grad, dense.bias.grad, dtype)
    if "mask" in layer._saved_index():
        assert not layer.values.grad[~layer._saved_index()["mask"]].any()
    assert torch.equal(layer.survivors(), mask)


def module(out=8, inputs=16, holes=False, dtype=torch.float32, bias=True, mask=None, device=None):
    dense = nn.Linear(inputs, out, bias, dtype=dtype, device=device)
    mask = mask_24(out, inputs, holes=holes) if mask is None else mask
    return sk.SparseLinear.from_dense(dense, mask.to(dense.weight.device), "nm")
