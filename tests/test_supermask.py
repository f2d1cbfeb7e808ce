"""Masks trained over frozen weights, and weights trained along a tangent."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ticket_nets import TRAINING, X, Y, dataset, mlp, net
from torch import nn

import sparsekit as sk
from sparsekit.mask import density
from sparsekit.ticket.supermask import EdgePopup, harvest, supermask
from sparsekit.ticket.tangent import Tangent
from sparsekit.ticket.train import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen_and_scores(model):
    own = dict(model.named_parameters())
    return {n for n, p in own.items() if not p.requires_grad}, {n for n, p in own.items() if p.requires_grad}


@pytest.mark.parametrize("kind", ["edge-popup", "bernoulli"])
def test_only_scores_are_trained(kind):
    torch.manual_seed(0)
    original = net()
    model = supermask(original, 0.5, kind, exclude="7")
    frozen, scores = frozen_and_scores(model)
    assert scores == {f"{i}.parametrizations.weight.0.scores" for i in (0, 5)} and "7.weight" in frozen
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    for _ in range(5):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
    assert all(p.requires_grad for p in original.parameters())


def test_edge_popup_keeps_exactly_its_share_and_passes_gradients_straight_through():
    model = supermask(mlp(10, 12, 3), 0.3)
    x = torch.randn(4, 10)
    mask = model.fc1.parametrizations.weight[0]
    scores = mask.scores.detach().abs()
    kept = model.fc1.weight != 0
    assert int(kept.sum()) == 36 == int(mask.mask().sum())
    assert scores[kept].min() >= scores[~kept].max()
    model(x).square().sum().backward()
    twin = mlp(10, 12, 3)
    twin.load_state_dict(
        {"fc1.bias": model.fc1.bias, "fc2.bias": model.fc2.bias}
        | {f"{n}.weight": getattr(model, n).weight for n in ("fc1", "fc2")}
    )
    twin(x).square().sum().backward()
    want = twin.fc1.weight.grad * model.fc1.parametrizations.weight.original * mask.scores.detach().sign()
    torch.testing.assert_close(mask.scores.grad, want)


def test_signed_constants():
    model = mlp(10, 12, 3)
    weight = model.fc1.weight.detach()
    popup = supermask(model, 0.5).fc1.parametrizations.weight.original
    assert torch.equal(popup.sign(), weight.sign()) and popup.abs().unique().item() == pytest.approx((2 / 5) ** 0.5)
    spread = supermask(model, 0.5, "bernoulli").fc1.parametrizations.weight.original.abs().unique()
    assert spread.item() == pytest.approx(float(weight.std(correction=0)))
    assert torch.equal(supermask(model, 0.5, constant=False).fc1.parametrizations.weight.original, weight)


def test_bernoulli_masks_are_drawn_in_training_and_rescaled():
    model = supermask(mlp(50, 40, 3), 0.3, "bernoulli").train()
    first, second = model.fc1.weight.detach(), model.fc1.weight.detach()
    assert not torch.equal(first, second)
    kept = first != 0
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.03)
    constant = model.fc1.parametrizations.weight.original.abs().unique().item()
    torch.testing.assert_close(first[kept].abs().mean().item(), constant / kept.float().mean().item())
    assert torch.equal(model.eval().fc1.weight, model.fc1.weight)


@pytest.mark.parametrize("kind", ["edge-popup", "bernoulli"])
def test_a_harvest_computes_the_same_sparse(kind):
    data = dataset()
    model = supermask(nn.Sequential(nn.Flatten(), mlp(16, 64, 3)), 0.5, kind)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "scores"):
                module.scores.add_(0.5 * torch.randn_like(module.scores))
    before = fit(
        copy.deepcopy(model), data, TRAINING.__class__(1, 20, "sgd", 0.0, eval_every=1), lambda n, e: torch.arange(n)
    )
    after = fit(
        model, data, TRAINING.__class__(150, 20, "sgd", 1.0, 0.9, eval_every=50), lambda n, e: torch.randperm(n)
    )
    assert after.val_loss < before.val_loss - 0.1  # a mask alone learns
    dense, masks = harvest(model)
    assert list(masks) == ["1.fc1.weight", "1.fc2.weight"] and 0.2 < density(masks) < 0.8
    fast = sk.convert(dense, masks, impl="csr")
    torch.testing.assert_close(fast(data.test_x), model.eval()(data.test_x), rtol=1e-4, atol=1e-5)
    assert type(dense[1].fc1) is nn.Linear and all(p.requires_grad for p in dense.parameters())
    for name, mask in masks.items():
        assert torch.equal(dense.get_parameter(name) != 0, mask)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kind": "popup"}, "Expected a supermask of edge-popup, bernoulli, got 'popup'"),
        ({"density": 0}, "Expected a density above 0, at most 1, got 0"),
        ({"exclude": "9"}, "Expected exclude to name prunable layers"),
    ],
)
def test_bad_supermasks(how, message):
    with pytest.raises(ValueError, match=message):
        supermask(net(), **how)
    with pytest.raises(ValueError, match=r"Expected a model that supermask\(\) made, got Sequential"):
        harvest(net())
    sparse = sk.convert(net(), sk.prune(net(), 0.5), impl="csr")
    with pytest.raises(ValueError, match=r"0\.weight: Expected a dense weight, got a pruned one"):
        supermask(sparse)


# Tangents


def test_a_tangent_is_the_first_order_expansion():
    model = net().double().eval()
    masks = sk.prune(model, 0.5, scope="layer")
    x = X.double()
    tangent = Tangent(model, masks)
    sparse = sk.to_dense(sk.convert(model, masks, impl="csr"))
    torch.testing.assert_close(tangent(x), sparse(x))  # at w0 it is the network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for move in tangent.moves:
            move.copy_(1e-5 * torch.randn(move.shape, generator=generator))
    error = (tangent(x) - tangent.moved()(x)).abs().max()
    change = (tangent(x) - sparse(x)).abs().max()
    assert change > 1e-6 and error < 1e-3 * change
    with torch.no_grad():
        for move in tangent.moves:
            move.mul_(1e5)
    torch.testing.assert_close((tangent(x) - sparse(x)).abs().max(), 1e5 * change)  # and stays linear far away


def test_a_tangent_is_trained_under_its_mask_with_exact_zeros():
    data = dataset()
    model = nn.Sequential(nn.Flatten(), mlp(16, 64, 3))
    masks = sk.prune(model, 0.7, scope="layer")
    fast = sk.convert(model, masks, impl="csr")
    tangent = Tangent(fast)
    sizes = [move.numel() for move in tangent.moves]
    assert sizes == [int(masks["1.fc1.weight"].sum()), 64, int(masks["1.fc2.weight"].sum()), 3]
    before = tangent(data.test_x).detach()
    training = TRAINING.__class__(100, 20, "adam", 1e-2, weight_decay=0.1, eval_every=50)
    result = fit(tangent, data, training, lambda n, e: torch.randperm(n))
    assert result.test_accuracy > 0.5 and not torch.equal(tangent(data.test_x), before)
    moved = tangent.moved()
    for name, mask in masks.items():
        weight = moved.get_parameter(name)
        assert not weight[~mask].any() and weight.requires_grad
    assert torch.equal(sk.to_dense(fast)[1].fc1.weight, model[1].fc1.weight * masks["1.fc1.weight"])  # not changed


def test_a_tangent_does_not_touch_batch_norms():
    tangent = Tangent(net()).train()
    assert not tangent.base.training
    F.cross_entropy(tangent(X), Y).backward()
    assert tangent.base[1].num_batches_tracked == 0 and all(m.grad is not None for m in tangent.moves)
    with pytest.raises(ValueError, match="Expected masks for prunable weights"):
        Tangent(net(), {"9.weight": torch.ones(1, dtype=torch.bool)})


@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 1.0])
def test_edge_popup_selects_as_a_stable_sort_would(density):
    generator = torch.Generator().manual_seed(0)
    mask = EdgePopup(torch.empty(12, 25), density, generator)
    with torch.no_grad():
        mask.scores.copy_(torch.randint(-3, 4, mask.scores.shape, generator=generator))  # ties everywhere
    order = mask.scores.abs().flatten().argsort(descending=True, stable=True)
    expected = torch.zeros(300, dtype=torch.bool)
    expected[order[: int(density * 300 + 0.5)]] = True
    assert torch.equal(mask.mask().flatten(), expected)
