"""fuse: the same function with fewer modules, whatever the format."""

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit import format as formats
from sparsekit.nn import compaction
from sparsekit.nn.bordered import BorderedConv2d
from sparsekit.nn.fuse import Applied
from sparsekit.nn.pool import Pooled


class Block(nn.Module):
    """A residual block: one norm is read by two, one activation is functional."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.last = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.norm1(self.first(x)))
        return self.last(self.norm2(self.second(y)) + x)


def settled(model, x):
    """``model`` in eval mode with norm statistics of its own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model.train()
    for _ in range(3):
        model(x)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*runs as a dense product")
@pytest.mark.parametrize("name", ["dense", "csr", "bsr"])
def test_a_residual_block_is_the_same_function(name):
    x = torch.randn(2, 16, 6, 5)
    model = settled(nn.Sequential(Block(), Block()), x)
    sparse = sk.convert(model, sk.prune(model, 0.5, pattern="block:8x8"), impl=name)
    fused = sk.fuse(sparse)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), sparse(x), rtol=1e-4, atol=1e-5)
    kinds = [type(module).__name__ for module in fused.modules()]
    assert kinds.count("BatchNorm2d") == 0  # the sum reads the second norm, not the convolution
    assert kinds.count("Applied") == 2 and kinds.count("ReLU") == 4  # the last two follow a sum
    assert [m.activation for m in fused.modules() if isinstance(m, sk.SparseConv2d)] == ["relu", "none"] * 2
    assert sparse[0].norm1.weight is not None and sparse[0].first.bias is None  # a copy was fused
    assert "activation=relu" in repr(fused[0].first)
    for before, after in zip(sk.masks_of(sparse).values(), sk.masks_of(fused).values(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.GELU("tanh"), nn.Tanh()])
@pytest.mark.parametrize("name", formats.names())
def test_activations(name, activation):
    model = nn.Sequential(nn.Linear(32, 24), activation, nn.Linear(24, 16)).eval()
    masks = sk.prune(model, 0.5, pattern="2:4" if name == "nm" else "block:8x8")
    sparse = nn.Sequential(*(sk.SparseLinear.from_dense(model[i], masks[f"{i}.weight"], name) for i in (0, 2)))
    sparse = nn.Sequential(sparse[0], activation, sparse[1]).eval()
    fused = sk.fuse(sparse)
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), sparse(x))
    known = not isinstance(activation, nn.Tanh) and getattr(activation, "approximate", "none") == "none"
    assert isinstance(fused[1], Applied) == known
    x.requires_grad_()
    wanted = torch.autograd.grad(sparse(x).square().sum(), [x, sparse[0].values])
    got = torch.autograd.grad(fused(x).square().sum(), [x, fused[0].values])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_to_dense_puts_activations_back():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    sparse = sk.convert(model, sk.prune(model, 0.5), impl="csr")
    dense = sk.to_dense(sk.fuse(sparse))
    assert [type(module) for module in dense] == [nn.Linear, nn.ReLU, nn.Linear]
    x = torch.randn(3, 16)
    torch.testing.assert_close(dense(x), sparse(x))


def test_pools_are_the_same_to_the_bit_and_come_back():
    pools = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *pools).eval()
    sparse = sk.convert(model, sk.prune(model, 0.5), impl="csr")
    fused = sk.fuse(sparse)
    assert [isinstance(module, Pooled) for module in fused] == [False, True, True, False, False]
    x = torch.randn(2, 3, 40, 37)
    for one in (x, x[0], x.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            assert torch.equal(fused(one), sparse(one))
            assert fused(one).stride() == sparse(one).stride()
    x.requires_grad_()
    assert torch.equal(*(torch.autograd.grad(m(x).square().sum(), x)[0] for m in (fused, sparse)))
    grads = [torch.func.grad(lambda x, m=m: m(x).square().sum())(x.detach()) for m in (fused, sparse)]
    assert torch.equal(*grads)
    assert [type(module) for module in sk.to_dense(fused)] == [nn.Conv2d] + [nn.MaxPool2d] * 4
    assert sk.to_dense(fused)[1].kernel_size == 3


def test_what_is_called_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu = nn.Linear(16, 16), nn.ReLU()

        def forward(self, x):
            return self.relu(self.fc(self.relu(self.fc(x))))

    model = Twice().eval()
    fused = sk.fuse(sk.convert(model, sk.prune(model, 0.5), impl="csr"))
    assert isinstance(fused.relu, nn.ReLU) and fused.fc.activation == "none"


def test_untraceable_models_stay():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 16), nn.Identity(), nn.ReLU())

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    model = Branch().eval()
    sparse = sk.convert(model, sk.prune(model, 0.5), impl="csr")
    with pytest.warns(UserWarning, match="nothing fused, torch.fx cannot trace it"):
        fused = sk.fuse(sparse)
    assert fused.body[0].activation == "none"
    x = torch.randn(4, 16)
    torch.testing.assert_close(fused(x), sparse(x))


def test_norms_stay_in_training_mode():
    x = torch.randn(4, 16, 6, 5)
    model = settled(Block(), x).train()
    sparse = sk.convert(model, sk.prune(model, 0.5), impl="csr")
    fused = sk.fuse(sparse)
    assert type(fused.norm1) is nn.BatchNorm2d
    torch.testing.assert_close(fused(x), sparse(x))
    torch.testing.assert_close(fused.norm1.running_mean, sparse.norm1.running_mean)


def test_norms_after_plain_convolutions_are_folded_too():
    x = torch.randn(2, 3, 6, 5)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, bias=False),
                          nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))  # fmt: skip
    model = settled(model, x)
    torch.nn.utils.prune.random_unstructured(model[3], "weight", 0.5)
    tied = nn.ModuleList([nn.Conv2d(4, 4, 1)])
    tied[0].weight = model[5].weight
    before = tied[0].weight.detach().clone()
    fused = sk.fuse(model, inplace=True)
    assert [type(module) for module in fused][1::2] == [nn.Identity, nn.Conv2d, nn.Conv2d]
    assert type(fused[4]) is nn.BatchNorm2d and type(fused[6]) is nn.Identity
    assert torch.equal(tied[0].weight, before)


def test_folding_a_map_of_constants(monkeypatch):
    monkeypatch.setattr(compaction, "compare", lambda *a: {"carried": 2.0, "mapped": 1.0})
    x = torch.randn(2, 3, 6, 5)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    model = settled(model, x)
    nn.init.constant_(model[0].bias, 0.5)
    mask = torch.ones(8, 3, 1, 1) > 0
    mask[2:] = False
    cut = sk.compact(model, {"0.weight": mask}, x, inference=True)
    fused = sk.fuse(cut.model)
    assert isinstance(fused[2], BorderedConv2d) and type(fused[3]) is nn.Identity
    with torch.no_grad():
        torch.testing.assert_close(fused(x), cut.original(x), rtol=1e-4, atol=1e-5)
