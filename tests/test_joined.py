"""Joined blocks: sums and activations inside convolutions, the same function to the bit, and the way back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.nn.joined import Joined, join, separate


class Block(nn.Module):
    """A residual block as they are written: one ReLU called twice, a shortcut made after what it is added to."""

    def __init__(self, inputs=16, width=24, stride=2):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride), nn.Identity())

    def forward(self, x):
        y = self.norm(self.conv2(self.relu(self.conv1(x))))
        y += self.downsample(x)
        return self.relu(y)


class Functional(Block):
    def forward(self, x, scale: float = 1.0):
        y = torch.add(self.downsample(x), self.conv2(F.relu(self.conv1(x), inplace=True)))
        return {"out": F.relu(y) * scale}


class Contained(nn.Module):
    """The last convolution of a branch inside a container, and no activation after the sum."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Identity())

    def forward(self, x):
        return x + self.branch(x)


def sparse(model, impl="csr"):
    return sk.convert(model.eval(), sk.prune(model, 0.6, pattern="block:8x8"), impl=impl)


def apart(model):
    """A copy whose modules run their own code."""
    model = copy.deepcopy(model)
    for module in model.modules():
        separate(module)
    return model


def calls(block):
    """What a joined block asks of its convolutions: whether something is added, and the activation."""
    return [(args[1] is not None, args[2]) for op, _, args, *_ in block.forward.calls if len(args) == 3]


x = torch.randn(2, 16, 9, 8)


def out(y):
    return y["out"] if isinstance(y, dict) else y


@pytest.mark.filterwarnings("ignore:.*runs as a dense product")
@pytest.mark.parametrize("impl", ["csr", "dense", "bsr"])
@pytest.mark.parametrize("kind", [Block, Functional, Contained])
def test_joined_blocks_are_the_same_function(kind, impl):
    model = sparse(nn.Sequential(kind()), impl)
    fused = sk.fuse(model)
    assert calls(fused[0]) == ([(True, "none")] if kind is Contained else [(False, "relu"), (True, "relu")])
    for one in (x, x[:0], x.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            assert torch.equal(out(fused(one)), out(apart(fused)(one)))
    before = x.clone()
    grads = []
    for twin in (fused, model):
        found = torch.autograd.grad(out(twin(x)).square().sum(), [*twin.parameters()])
        grads.append(found)
    assert torch.equal(x, before)
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)
    dense = sk.to_dense(fused)
    assert not any("forward" in vars(module) for module in dense.modules())
    torch.testing.assert_close(out(dense(x)), out(model(x)))


def test_norms_are_folded_first():
    model = sparse(nn.Sequential(Block()))
    model[0].norm = nn.BatchNorm2d(24).eval()
    nn.init.uniform_(model[0].norm.weight, 0.5, 1.5)
    fused = sk.fuse(model)
    assert calls(fused[0]) == [(False, "relu"), (True, "relu")]
    torch.testing.assert_close(fused(x), model(x))


def test_calls_are_those_of_the_module():
    fused = sk.fuse(sparse(Functional()))
    with torch.no_grad():
        plain = apart(fused)(x)["out"]
        assert torch.equal(fused(x, 2.0)["out"], 2 * plain) and torch.equal(fused(x=x, scale=3.0)["out"], 3 * plain)
        for wrong in ((), (x, 1.0, 2)):
            with pytest.raises(TypeError, match="forward"):
                fused(*wrong)
        assert fused(x[:, :, :1, :1])["out"].shape == (2, 24, 1, 1)
        with pytest.raises(ValueError, match="Expected an input of shape"):
            fused(x[:, 1:])


def test_copies_files_and_tracers_take_joined_blocks():
    fused = sk.fuse(sparse(nn.Sequential(Block())))
    want = apart(fused)(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert twin[0].forward.module is twin[0]
        assert torch.equal(twin(x), want)
    assert torch.equal(torch.fx.symbolic_trace(fused.eval())(x), want)
    with torch.no_grad():
        assert torch.equal(torch.export.export(fused, (x,)).module()(x), apart(fused)(x))
    assert calls(sk.fuse(fused)[0]) == calls(fused[0])


class Odd(Block):
    """Blocks that must stay as they are written, by the name of the reason."""

    def __init__(self, why):
        super().__init__(16, 16, 1)
        self.why = why

    def forward(self, x):
        h = self.conv1(x).sigmoid()
        y = self.conv2(h)
        if self.why == "its input is overwritten before the sum":
            h.mul_(2)
        if self.why == "the result is read twice":
            return y + x, y.mean()
        if self.why == "the sum overwrites something else":
            return x.add_(y)
        if self.why == "a mode decides":
            return F.dropout(y + x, 0.5, self.training)
        return torch.add(y, x, alpha=2) if self.why == "the sum is scaled" else y + x


REASONS = [
    "its input is overwritten before the sum",
    "the result is read twice",
    "the sum overwrites something else",
    "a mode decides",
    "the sum is scaled",
    "a hook looks on",
]


@pytest.mark.parametrize("why", REASONS)
def test_what_stays(why):
    model = sparse(Odd(why))
    if why == REASONS[-1]:
        model.conv2.register_forward_hook(lambda module, args, y: y * 2)
    join(model)
    assert not isinstance(model.forward, Joined)


def test_what_cannot_be_added_inside_is_added_after():
    """Another shape or dtype, a number, gradients, autocast, transforms: any sum that torch can make."""
    model = sparse(Block(16, 16, 1))
    conv = model.conv2
    y, row = conv(x), torch.randn(1, 16, 1, 1)
    torch.testing.assert_close(conv(x, row, "relu"), (y + row).relu())
    torch.testing.assert_close(conv(x, 2.0, "silu"), F.silu(y + 2))
    assert conv(x, x.double()).dtype == torch.float64
    skip = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(conv(x, skip, "relu").sum(), skip)
    assert torch.equal(grad, (y + x > 0).float())
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(lambda s: conv(x, s, "relu"))(row), (y + row).relu()[None])
        torch.testing.assert_close(conv(x[0], x[0], "relu"), (y + x)[0].relu())
        assert torch.equal(x, skip)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x, x.bfloat16(), "relu").dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="csr_conv2d: Expected skip of shape"):
        index = [conv._buffers[name] for name in ("crow_indices", "col_indices")]
        how = [3, 3], [1, 1], [1, 1], [1, 1], 1, None, "none", row
        torch.ops.sparsekit.csr_conv2d(x, conv.values.detach(), *index, None, *how)
