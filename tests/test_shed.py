"""Dense layers that only infer hold no mask: their zeros say it, and it is there again when anything needs it."""

import copy
import io
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import sparsekit as sk


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 12)).to(dtype)


def converted(training=False, zero=False, dtype=torch.float32):
    """A model, its masks, what it became, and an input; ``zero``: a survivor is 0."""
    model, x = model_of(dtype), torch.randn(2, 3, 7, 7, dtype=dtype)
    masks = sk.prune(model, 0.5)
    if zero:
        with torch.no_grad():
            model[3].weight[tuple(masks["3.weight"].nonzero()[0])] = 0
    return model, masks, sk.convert(model, masks, training=training, impl="dense"), x


def train(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def is_masked(model, masks):
    for layer, mask in zip((model[0], model[3]), masks.values(), strict=True):
        assert torch.equal(layer.survivors(), mask) and bool((layer.values[~mask] == 0).all())


def held(model):
    return [name for name, _ in model.named_buffers()]


def bytes_of(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inference_holds_what_dense_holds(dtype):
    model, masks, fast, x = converted(dtype=dtype)
    assert held(fast) == [] and bytes_of(fast) == bytes_of(model) == sk.explain(fast).bytes
    is_masked(fast, masks)
    want = sk.to_dense(fast)
    with torch.no_grad():
        assert torch.equal(fast(x), want(x))
    assert held(fast) == []
    assert held(converted(training=True)[2]) == ["0.mask", "3.mask"]


def test_a_survivor_that_is_zero_needs_the_mask():
    _, masks, fast, x = converted(zero=True)
    assert held(fast) == ["3.mask"]
    train(fast, x)
    is_masked(fast, masks)
    assert bool((fast[3].values[masks["3.weight"]] != 0).all())


def test_training_holds_it_again():
    _, masks, fast, x = converted()
    other = converted(training=True)[2]
    for net in (fast, other):
        train(net, x)
    assert held(fast) == [] and [layer.bytes() for layer in fast[::3]] == [layer.bytes() for layer in other[::3]]
    is_masked(fast, masks)
    assert all(map(torch.equal, fast.state_dict().values(), other.state_dict().values()))
    with torch.no_grad():
        fast[3].values.zero_()
    is_masked(fast, masks)


@pytest.mark.parametrize("assign", [False, True])
def test_files_are_those_of_other_layers(assign):
    _, masks, fast, _ = converted()
    other = converted(training=True)[2]
    state = fast.state_dict()
    assert list(state) == list(other.state_dict()) and held(fast) == []
    assert torch.equal(state["3.mask"], masks["3.weight"])
    with torch.no_grad():
        for p in fast.parameters():
            p.mul_(2)
    other.load_state_dict(fast.state_dict(), assign=assign)
    is_masked(other, masks)
    assert torch.equal(other[0].values, fast[0].values)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_what_is_loaded_is_pruned_as_before(assign, zeros):
    _, masks, fast, x = converted()
    dense = {name: torch.randn_like(tensor) for name, tensor in model_of().state_dict().items()}
    if zeros:
        dense["3.weight"][:6] = 0
    fast.load_state_dict(dense, assign=assign)
    is_masked(fast, masks)
    assert (fast[3].bytes() > fast[3].to_dense().weight.numel() * 4 + 48) == zeros
    assert torch.equal(fast[0].values, dense["0.weight"] * masks["0.weight"])
    train(fast, x)
    is_masked(fast, masks)
    others = {name: ~mask for name, mask in masks.items()}
    stored = {f"{name}_orig": torch.ones(mask.shape) for name, mask in others.items()}
    stored |= {f"{name}_mask": mask.float() for name, mask in others.items()}
    stored |= {name: dense[name] for name in ("0.bias", "3.bias")}
    fast.load_state_dict(stored)
    is_masked(fast, others)


def grad_of(values, fast, layer, x):
    names = dict(fast.named_parameters())
    given = {**names, f"{layer}.values": values}
    return functional_call(fast, given, (x,)).square().sum()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("way", ["called", "func", "vmapped", "compiled"])
def test_gradients_reach_survivors_only(way, first):
    _, masks, fast, x = converted()
    want = converted(training=True)[2]
    mask, values = masks["3.weight"], torch.randn(12, 200)  # nothing of it is 0
    if not first:
        for net in (fast, want):
            net(x).sum().backward()
    if way == "called":
        grads = [torch.autograd.grad(grad_of(v := values.clone().requires_grad_(), net, 3, x), v)[0]
                 for net in (fast, want)]  # fmt: skip
    elif way == "compiled":
        for net in (fast, want):
            net.zero_grad()
            torch.compile(net, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
        grads = [net[3].values.grad for net in (fast, want)]
    else:
        call = torch.func.grad(grad_of)
        if way == "vmapped":
            values = torch.stack([values, 2 * values])
            call = torch.func.vmap(call, (0, None, None, None))
        grads = [call(values, net, 3, x) for net in (fast, want)]
    assert torch.equal(*grads) and bool((grads[0][..., ~mask] == 0).all())
    is_masked(fast, masks)
    train(fast, x)
    is_masked(fast, masks)


def test_copies_files_and_formats():
    _, masks, fast, x = converted()
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    moved = converted()[2]
    moved[3].set_format("csr")
    moved[3].set_format("dense")
    again = sk.convert(fast, training=True, impl="dense")
    for net in (copy.deepcopy(fast), torch.load(file, weights_only=False), again, moved):
        is_masked(net, masks)
        train(net, x)
        is_masked(net, masks)
    assert held(fast) == []


def test_another_dtype_may_have_other_zeros():
    _, masks, fast, x = converted()
    with torch.no_grad():
        fast[3].values.mul_(1e-9)
    fast.half()
    assert fast[3].bytes() == 3 * 2400 + 24 and fast[0].bytes() == 2 * 216 + 16
    is_masked(fast.float(), masks)
    fast.double()
    is_masked(fast, masks)
    train(fast, x.double())
    is_masked(fast, masks)


def test_initial_values_and_packed_ones():
    _, masks, fast, _ = converted()
    fast[3].reset_parameters()
    with torch.no_grad():
        fast[0].values.copy_(fast[0].pack(torch.zeros(8, 3, 3, 3)))
    is_masked(fast, masks)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages(use_buffers):
    _, masks, fast, x = converted()
    mean = AveragedModel(fast, avg_fn=get_ema_avg_fn(0.5), use_buffers=use_buffers)
    for _ in range(3):
        train(fast, x, 1)
        mean.update_parameters(fast)
    is_masked(mean.module, masks)
    assert not torch.equal(mean.module[3].values, fast[3].values)
    train(mean, x)
    is_masked(mean.module, masks)


def test_exported_and_folded():
    _, masks, fast, x = converted()
    program = torch.export.export(fast, (x,))
    with torch.no_grad():
        assert torch.equal(program.module()(x), fast(x))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    masks = sk.prune(model, 0.5)
    fast = sk.fuse(sk.convert(model, masks, impl="dense"))
    assert held(fast) == [] and torch.equal(fast[0].survivors(), masks["0.weight"])


def test_layers_that_the_whole_model_makes_dense_again_hold_no_mask(monkeypatch):
    whole, planning = sys.modules["sparsekit.nn.whole"], sys.modules["sparsekit.nn.planning"]
    csr = lambda thunks, key: ("csr", {name: 1.0 + (name == "dense") for name in thunks})  # noqa: E731
    monkeypatch.setattr(planning, "choose", csr)
    monkeypatch.setattr(whole, "measure", lambda passes, seconds: {"dense": 1.0, "sparse": 2.0})
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    fast = sk.convert(model, sk.prune(model, 0.9), torch.randn(20, 64))
    assert [layer.chosen for layer in sk.explain(fast).layers] == ["dense", "dense"] and held(fast) == []
