"""convert(regroup=True): another order of rows where it is faster, and the way back to the original one."""

import copy

import pytest
import torch
from test_compaction import settle
from torch import nn

import sparsekit as sk
from sparsekit.nn import ordered
from sparsekit.nn.convert import dense_state


@pytest.fixture
def regrouped_wins(monkeypatch):
    times = {"natural": 20.0, "regrouped": 10.0}
    monkeypatch.setattr(ordered, "compare", lambda *a: dict(times))
    return times


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, bias=False),
        nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 40), nn.ReLU(), nn.Linear(40, 5),
    )  # fmt: skip
    return settle(model, 0).eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def made(training=False, **how):
    model = net()
    masks = sk.prune(model, 0.8)
    return model, masks, sk.convert(model, masks, X, training, impl="csr", regroup=True, **how)


def masked(model, masks):
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    return model


def test_everything_that_leaves_is_in_the_original_order(regrouped_wins, tmp_path):
    model, masks, fast = made()
    plain = masked(model, masks)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), plain(X), rtol=1e-4, atol=1e-5)
    assert not torch.equal(fast[3].weight, plain[3].weight)  # it does run in another order
    for state in (sk.to_dense(fast).state_dict(), dense_state(fast), sk.to_dense(copy.deepcopy(fast)).state_dict()):
        assert state.keys() == model.state_dict().keys()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(state[name], tensor), name
    for name, mask in sk.masks_of(fast).items():
        assert torch.equal(mask, masks[name])
    loaded = sk.load(sk.save(fast, tmp_path / "t.safetensors"), net(), impl="csr")
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), fast(X), rtol=1e-4, atol=1e-5)
    assert "2.00x of the natural order's speed" in str(sk.explain(fast))


def test_training_fusing_and_nesting_go_back_too(regrouped_wins):
    model, masks, fast = made(training=True)
    optimizer = torch.optim.Adam(fast.parameters(), lr=0.01)
    fast.train()
    for _ in range(3):
        fast(X).square().sum().backward()
        optimizer.step()
    fast.eval()
    with torch.no_grad():
        wanted = fast(X)
        for other in (sk.to_dense(fast), sk.to_dense(nn.Sequential(fast)), sk.to_dense(sk.fuse(fast))):
            torch.testing.assert_close(other(X), wanted, rtol=1e-3, atol=1e-4)
    for name, mask in masks.items():
        assert (sk.to_dense(fast).get_parameter(name)[~mask] == 0).all()


def test_a_state_of_another_order_is_refused(regrouped_wins):
    _, _, fast = made()
    twin, state = copy.deepcopy(fast), fast.state_dict()
    twin.load_state_dict(state)
    with pytest.raises(RuntimeError, match='Missing key.* "regrouped"'):
        twin.load_state_dict(net().state_dict())
    with pytest.raises(RuntimeError, match="Expected weights in this model's order of rows, got another order"):
        twin.load_state_dict(state | {"regrouped": torch.zeros(2, dtype=torch.int64)})
    sk.to_dense(twin).load_state_dict(net().state_dict())  # the order, and its check, are gone


def test_the_natural_order_stays_where_it_is_as_fast(regrouped_wins):
    regrouped_wins["regrouped"] = 19.9
    model, masks, fast = made()
    assert torch.equal(fast[3].weight, masked(model, masks)[3].weight)
    assert "rows in their natural order: 1.01x of its speed regrouped" in str(sk.explain(fast))
    assert "regrouped" not in fast.state_dict()


def test_what_cannot_move_says_why():
    model = nn.Sequential(nn.Linear(16, 8))
    fast = sk.convert(model, sk.prune(model, 0.5), torch.randn(4, 16), regroup=True)
    assert "rows in their natural order: an output of the model" in str(sk.explain(fast))


def test_it_measures():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(16, 64)
    fast = sk.convert(model, sk.prune(model, 0.8), x, regroup=True)
    note = sk.explain(fast).totals()["note"]
    assert "natural order" in note and "x of" in note
    with torch.no_grad():
        torch.testing.assert_close(fast(x), masked(model, sk.prune(model, 0.8))(x), rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    model = nn.Sequential(nn.Linear(8, 8))
    for how in ({}, {"example_inputs": torch.randn(2, 8), "inplace": True}):
        with pytest.raises(ValueError, match="Expected regroup=True with example_inputs"):
            sk.convert(model, sk.prune(model, 0.5), regroup=True, **how)
