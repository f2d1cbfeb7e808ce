"""Replicates trained together end where each ends alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit import convert, models, nets, prune, tickets
from sparsekit.data import Dataset
from sparsekit.nn import stack as stacks
from sparsekit.nn.stack import Stack
from sparsekit.ticket.replicates import fit_together, train_round_together
from sparsekit.ticket.train import Training, fit, train_round


@pytest.fixture(autouse=True, params=["csr", "dense"])
def runs_as(request, monkeypatch):
    """Measured choices would leave one of the two untested."""

    def choose(thunks):
        for thunk in thunks.values():
            thunk()
        return request.param, {}

    monkeypatch.setattr(stacks, "choose", choose)


def lenet(seed, sparsity, impl="csr"):
    model = models.build("mlp:36-40-24-5", classes=5, input_shape=(1, 6, 6), seed=seed)
    return convert(model, prune(model, sparsity, scope="layer"), impl=impl) if sparsity else model


def conv(seed, sparsity, impl="csr"):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return convert(model, prune(model, sparsity, scope="layer"), impl=impl) if sparsity else model


BUILD = {"mlp": (lenet, (1, 6, 6)), "conv": (conv, (2, 6, 6))}
each_net = pytest.mark.parametrize("net", BUILD)


def replicates(net, **options):
    build, shape = BUILD[net]
    return [build(seed, sparsity, **options) for seed, sparsity in enumerate((0.0, 0.5, 0.9, 0.9))], shape


@each_net
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_equal_those_alone(net, shared, optimizer):
    solos, shape = replicates(net)
    together = copy.deepcopy(solos)
    stack = Stack(together, torch.randn(8, *shape), shared).train()
    training = Training(5, optimizer=optimizer, lr=1e-2, momentum=0.9 * (optimizer == "sgd"), weight_decay=1e-3)
    joint, own = training.make_optimizer(stack), [training.make_optimizer(model.train()) for model in solos]
    for _ in range(5):
        x, y = torch.randn(len(solos), 8, *shape), torch.randint(5, (len(solos), 8))
        x, y = (x[:1].expand_as(x), y[:1].expand_as(y)) if shared else (x, y)
        F.cross_entropy(stack(x[0] if shared else x).transpose(1, 2), y, reduction="none").mean(1).sum().backward()
        joint.step()
        joint.zero_grad()
        for model, step, images, labels in zip(solos, own, x, y, strict=True):
            F.cross_entropy(model(images), labels).backward()
            step.step()
            step.zero_grad()
    stack.write_back()
    for alone, joined in zip(solos, together, strict=True):
        for (name, a), (_, b) in zip(alone.state_dict().items(), joined.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5, msg=name)


@each_net
def test_pruned_stays_pruned(net):
    together, shape = replicates(net)
    masks = [[m.survivors() for m in model.modules() if hasattr(m, "survivors")] for model in together]
    stack = Stack(together, torch.randn(4, *shape))
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        stack(torch.randn(4, 4, *shape)).square().sum().backward()
        optimizer.step()
    for _, whole in stack._leaves:
        if not hasattr(whole, "replicate_weight"):
            continue
        for number, model in enumerate(together):
            layer = dict(stack._leaves)
            path = next(path for path, module in layer.items() if module is whole)
            solo = model.get_submodule(path)
            if hasattr(solo, "survivors"):
                assert not whole.replicate_weight(number)[~solo.survivors()].any()
    stack.write_back()
    after = [[m.survivors() for m in model.modules() if hasattr(m, "survivors")] for model in together]
    for before, now in zip(masks, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def dataset():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 1, 6, 6, generator=generator)
    y = torch.randint(5, (300,), generator=generator)
    x = centres[y] + 0.7 * torch.randn(300, 1, 6, 6, generator=generator)
    return Dataset("made", 5, x[:200], y[:200], x[200:250], y[200:250], x[250:], y[250:], (0.0,), (1.0,))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("room", [150_000, 3000])
def test_fit_together_is_fit(shared, room, monkeypatch):
    monkeypatch.setattr("sparsekit.ticket.replicates._TOGETHER", room)  # networks of 2545, 1309, 321 and 320 weights
    data, training = dataset(), Training(40, batch_size=20, eval_every=10)

    def order(seed):
        return lambda count, epoch: torch.randperm(count, generator=torch.Generator().manual_seed(31 * seed + epoch))

    solos, _ = replicates("mlp")
    together = copy.deepcopy(solos)
    orders = [order(0 if shared else seed) for seed in range(len(solos))]
    want = [fit(model, data, training, own) for model, own in zip(solos, orders, strict=True)]
    got = fit_together(together, data, training, orders[0] if shared else orders)
    for one, other in zip(want, got, strict=True):
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-3)
        assert one.early_stop_iteration == other.early_stop_iteration
        assert one.test_accuracy == pytest.approx(other.test_accuracy, abs=0.021)
    for alone, joined in zip(solos, together, strict=True):
        for a, b in zip(alone.state_dict().values(), joined.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


def test_a_residual_net_stacks():
    parts = [nets.build("resnet20", 5, (1, 8, 8), torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    parts = [convert(model, prune(model, 0.8), impl="csr").eval() for model in parts]
    x = torch.randn(2, 3, 1, 8, 8)
    stack = Stack(parts, x[0]).eval()
    want = torch.stack([model(images) for model, images in zip(parts, x, strict=True)])
    torch.testing.assert_close(stack(x), want, rtol=1e-3, atol=1e-4)


def test_stacks_that_cannot_be():
    x = torch.randn(2, 1, 6, 6)
    with pytest.raises(ValueError, match="Expected models to stack, got none"):
        Stack([], x)
    with pytest.raises(ValueError, match="1: Expected a layer that keeps units apart, got Softmax"):
        Stack([nn.Sequential(nn.Flatten(), nn.Softmax(1))] * 2, x)
    with pytest.raises(ValueError, match="Expected layers of one class and geometry"):
        Stack([nn.Sequential(nn.Flatten(), nn.Linear(36, n)) for n in (4, 5)], x)

    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(36, 5)

        def forward(self, x):
            return self.fc(x.flatten(1)).softmax(1)

    with pytest.raises(ValueError, match="got one that mixes them"):
        Stack([Mixes(), Mixes()], x)
    stack = Stack([lenet(0, 0.5), lenet(1, 0.5)], x)
    with pytest.raises(ValueError, match=r"Expected an input of 2 replicates \[2, N, ...\], got \[3, 4, 1, 6, 6\]"):
        stack(torch.randn(3, 4, 1, 6, 6))
    with pytest.raises(ValueError, match="Expected one order per model, got 1 for 2"):
        fit_together([lenet(0, 0.5), lenet(1, 0.5)], dataset(), Training(1), [lambda count, epoch: torch.arange(count)])


def test_a_round_and_its_controls_train_together(tmp_path):
    data, training = dataset(), Training(20, batch_size=20, eval_every=10)
    model = models.build("mlp:36-40-24-5", classes=5, input_shape=(1, 6, 6), seed=0)
    controls = ("reinit", "reinit", "random")
    lines = []
    for train in (train_round, train_round_together):
        run = tickets(copy.deepcopy(model), 2, 0.5, run_dir=tmp_path / train.__name__, impl="csr")
        for round_ in run:
            how = {"controls": controls, "seed": 3}
            train(round_, data, training, **how)
        lines.append(run.summary["rounds"])
    for alone, together in zip(*lines, strict=True):
        assert together["density"] == alone["density"] and together["steps"] == 20
        assert together["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-2)
        assert together.get("controls", {}).keys() == alone.get("controls", {}).keys()
        for name, control in alone.get("controls", {}).items():
            assert together["controls"][name]["val_loss"] == pytest.approx(control["val_loss"], rel=1e-2)
            assert len(together["controls"][name].get("runs", [0])) == len(control.get("runs", [0]))
    run = tickets(model, 1, 0.5, rewind="5it")
    with pytest.raises(ValueError, match="Expected rewind='init'"):
        train_round_together(next(iter(run)), data, training)
