"""A step written out leaves every bit as torch's own loop does, and steps aside where it cannot."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit import convert, models, prune
from sparsekit.nn import stack as stacks
from sparsekit.nn import streamline
from sparsekit.nn.stack import Stack
from sparsekit.ticket import replicates
from sparsekit.ticket.direct import direct_logits, direct_step
from sparsekit.ticket.replicates import fit_together, stack_step
from sparsekit.ticket.train import Training, make_step, torch_step

TRAINING = {
    "adam": Training(5),
    "adam, decay and warm-up": Training(5, weight_decay=1e-2, warmup=3, milestones=(4,)),
    "sgd": Training(5, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-3),
}


def net(density=0.3, impl="csr", dtype=torch.float32, seed=0, bias=True):
    model = models.build("mlp:36-40-24-5", classes=5, input_shape=(1, 6, 6), seed=seed).to(dtype)
    if not bias:
        model.fc2.bias = None
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(seed))
    return model if density is None else convert(model, prune(model, 1 - density, scope="layer"), impl=impl)


def batches(count=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sizes = [7, 7, 7, 3, 1][:count]  # the rows of a label are made anew where the batch changes
    return [
        (torch.randn(n, 1, 6, 6, dtype=dtype, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]


def run(model, training, make):
    """Train in place; the optimizer."""
    optimizer = training.make_optimizer(model)
    scheduler, step = training.make_scheduler(optimizer), make(model, optimizer)
    for x, y in batches(dtype=next(model.parameters()).dtype):
        step(x, y)
        if scheduler is not None:
            scheduler.step()
    return optimizer


def same(ours, torchs, optimizer, other):
    for (name, a), b in zip(ours.state_dict().items(), torchs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert all(parameter.grad is None for parameter in ours.parameters())


NETS = {
    "csr": lambda: net(),
    "streamlined": lambda: net(0.1),
    "dense under a mask": lambda: net(impl="dense"),
    "plain": lambda: net(None),
    "all or nothing": lambda: net(1.0),
    "no survivor": lambda: net(0.0),
    "no bias": lambda: net(bias=False),
    "float64": lambda: net(dtype=torch.float64),
}


@pytest.mark.filterwarnings("ignore:.*no weight survives")
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("training", TRAINING)
def test_to_the_bit(kind, training):
    ours = NETS[kind]().train()
    if kind == "streamlined":
        streamline(ours)
    torchs, training = copy.deepcopy(ours), TRAINING[training]
    masks = {name: values == 0 for name, values in ours.named_parameters() if kind == "dense under a mask"}
    optimizer, other = run(ours, training, written), run(torchs, training, torch_step)
    same(ours, torchs, optimizer, other)
    for name, pruned in masks.items():
        if name.endswith("values"):
            assert pruned.any() and not dict(ours.named_parameters())[name][pruned].any()


def written(model, optimizer):
    step = direct_step(model, optimizer)
    assert step is not None
    return step


def test_a_model_that_was_converted_for_inference():
    ours = net(None)
    masks = prune(ours, 0.7, scope="layer")
    x = torch.randn(4, 1, 6, 6)
    ours = convert(ours, masks, x, impl="dense").train()
    torchs = copy.deepcopy(ours)
    same(ours, torchs, run(ours, Training(5), written), run(torchs, Training(5), torch_step))
    assert not ours.fc1.weight[~masks["fc1.weight"]].any()


def test_formats_side_by_side():
    ours = net().train()
    ours.fc1.set_format("dense")
    ours.fc3.set_format("bitmap")
    torchs = copy.deepcopy(ours)
    same(ours, torchs, run(ours, Training(5), written), run(torchs, Training(5), torch_step))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("how", ["csr", "dense"])
@pytest.mark.parametrize("densities", [(0.3, 0.1, 0.5), (None, None, None)])
def test_stacks(shared, how, densities, monkeypatch):
    monkeypatch.setattr(stacks, "choose", lambda thunks: (how, {}))
    x, y = torch.randn(3, 7, 1, 6, 6), torch.randint(5, (3, 7))
    x, y = (x[0], y[:1].expand(3, -1)) if shared else (x, y)
    ours = Stack([net(d, seed=seed) for seed, d in enumerate(densities)], torch.randn(7, 1, 6, 6), shared).train()
    torchs = copy.deepcopy(ours)
    steps = written(ours, optimizer := Training(5).make_optimizer(ours))
    monkeypatch.setattr(replicates, "direct_step", lambda *_: None)
    plain = stack_step(torchs, Training(5).make_optimizer(torchs))
    for _ in range(4):
        steps(x, y)
        plain(x, y)
    for (name, a), b in zip(ours.state_dict().items(), torchs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert len(optimizer.state) == 6
    for layer in ours.modules():
        if getattr(layer, "pruned", None) is not None:
            assert layer.pruned.any() and not layer.values[layer.pruned].any()


@pytest.mark.parametrize("kind", ["csr", "streamlined", "no bias", "float64"])
def test_logits_in_one_call(kind):
    model = NETS[kind]()
    if kind == "streamlined":
        streamline(model.train())
    x = torch.randn(33, 1, 6, 6, dtype=next(model.parameters()).dtype)
    logits = direct_logits(model)
    assert logits is not model
    with torch.no_grad():
        torch.testing.assert_close(logits(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    plain = net(None)
    assert direct_logits(plain) is plain
    model.fc2.register_forward_hook(lambda *_: None)
    assert direct_logits(model) is model


@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_a_stack(shared):
    x = torch.randn(3, 33, 1, 6, 6)
    x = x[0] if shared else x
    parts = [net(density, seed=seed) for seed, density in enumerate((0.3, 0.1, 0.5))]
    stack = Stack(parts, torch.randn(33, 1, 6, 6), shared)
    logits = direct_logits(stack)
    assert logits is not stack
    with torch.no_grad():
        torch.testing.assert_close(logits(x), stack(x), rtol=1e-5, atol=1e-6)


def test_hooks_and_foreign_layers_are_left_to_torch():
    def refused(model, change=lambda model: None):
        change(model)
        optimizer = Training(1).make_optimizer(model)
        return direct_step(model, optimizer) is None and callable(make_step(model, optimizer))

    assert not refused(net())
    assert refused(net(), lambda m: m.fc1.register_forward_hook(lambda *_: None))
    assert refused(net(), lambda m: m.register_forward_pre_hook(lambda *_: None))
    assert refused(net(), lambda m: m.fc1.values.register_hook(lambda grad: None))
    assert refused(net(), lambda m: m.fc1.values.register_post_accumulate_grad_hook(lambda p: None))
    assert refused(net(), lambda m: m.fc1.values.requires_grad_(False))
    assert refused(nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.Dropout(), nn.Linear(9, 5)))
    assert refused(nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.GELU(), nn.Linear(9, 5)))
    assert refused(nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU()))
    assert refused(nn.Sequential(nn.Linear(36, 5)))
    assert refused(nn.Sequential(nn.Flatten(2), nn.Linear(6, 5)))
    assert refused(models.build("digits-conv", input_shape=(1, 8, 8)))
    with torch.autocast("cpu"):
        assert refused(net())
    some = net()
    assert direct_step(some, Training(1).make_optimizer(some.fc1)) is None


@pytest.mark.parametrize("kind", ["hook", "amsgrad", "two groups", "tensor rate"])
def test_another_adam_steps_by_itself(kind):
    calls, results = [], []
    for make in (written, torch_step):
        model = net()
        groups = [{"params": [p]} for p in model.parameters()] if kind == "two groups" else model.parameters()
        rate = torch.tensor(1e-3) if kind == "tensor rate" else 1e-3
        optimizer = torch.optim.Adam(groups, lr=rate, fused=True, amsgrad=kind == "amsgrad")
        if kind == "hook":
            optimizer.register_step_post_hook(lambda *_: calls.append(1))
        step = make(model, optimizer)
        for x, y in batches():
            step(x, y)
        results.append((model, optimizer))
    (ours, optimizer), (torchs, other) = results
    same(ours, torchs, optimizer, other)
    assert len(calls) == (10 if kind == "hook" else 0)


def test_a_loss_of_many_classes():
    """The written gradient against autograd's, in float64."""
    from sparsekit.ticket.direct import _LossGradient

    logits = torch.randn(11, 2 * 13, dtype=torch.float64, requires_grad=True)
    y = torch.randint(13, (2, 11))
    loss = sum(F.cross_entropy(part, labels) for part, labels in zip(logits.split(13, 1), y, strict=True))
    (want,) = torch.autograd.grad(loss, logits)
    found = _LossGradient()(logits.detach(), y, 2)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-15)


def test_networks_train_together_while_they_are_small(monkeypatch):
    parts = [net(0.2, seed=seed) for seed in range(5)]
    size = sum(p.numel() for p in parts[0].parameters())
    monkeypatch.setattr(replicates, "_TOGETHER", 2 * size + 60)
    assert [list(crew) for crew in replicates.crews(parts)] == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr(replicates, "_TOGETHER", 1)
    assert [list(crew) for crew in replicates.crews(parts)] == [[n] for n in range(5)]
    conv = [models.build("digits-conv", input_shape=(1, 8, 8), seed=seed) for seed in range(3)]
    assert [list(crew) for crew in replicates.crews(conv)] == [[0, 1, 2]]
    with pytest.raises(ValueError, match="Expected models to train, got none"):
        fit_together([], [], Training(1), [])
