"""Tickets elsewhere and looked at from outside: transfer, overlap, movement, work, early birds."""

import pytest
import torch
from ticket_nets import TRAINING, X, assert_equal, dataset, mlp, net, run
from torch import nn

import sparsekit as sk
from sparsekit.flops import flop_density, positions
from sparsekit.mask import density
from sparsekit.nn import SparseModule
from sparsekit.overlap import hamming, jaccard, movement, overlap, shared
from sparsekit.prune import refill
from sparsekit.ticket.early import EarlyBird, channel_masks
from sparsekit.ticket.train import fit
from sparsekit.ticket.transfer import transfer

pytestmark = pytest.mark.usefixtures("one_thread")


def masked(model, sparsity=0.7):
    return sk.prune(model, sparsity, scope="layer")


# Transfer


def test_body_and_mask_go_over_and_the_head_is_the_new_one_s():
    """From 3 classes to 5 (dead in another tool: its layers to leave out are never returned)."""
    old, new = net(), net()
    new[7] = nn.Linear(16, 5)
    head, before = new[7].weight.detach().clone(), {n: t.clone() for n, t in new.state_dict().items()}
    with torch.no_grad():
        old[1].running_mean.fill_(3.0)
        old[5].weight.add_(1.0)
    found = transfer(old, masked(old), new)
    assert list(found.masks) == ["0.weight", "5.weight"] and found.fresh == ["7.bias", "7.weight"]
    assert torch.equal(found.model[5].weight, old[5].weight) and torch.equal(found.model[7].weight, head)
    assert torch.equal(found.model[1].running_mean, old[1].running_mean)
    assert_equal(new.state_dict(), before)
    fast = sk.convert(found.model, found.masks, impl="csr", training=True)
    assert sum(isinstance(m, SparseModule) for m in fast.modules()) == 2 and fast(X).shape == (60, 5)
    assert_equal(sk.masks_of(fast), found.masks)


def test_names_can_be_left_out_and_renamed():
    old, masks = net(), masked(net())
    kept = transfer(old, masks, net(), exclude=("5", "7.*"))
    assert list(kept.masks) == ["0.weight"] and kept.fresh == ["5.bias", "5.weight", "7.bias", "7.weight"]
    wrapped = nn.ModuleDict({"body": net(), "body2": nn.Linear(2, 2)})
    found = transfer(old.state_dict(), masks, wrapped, rename={"": "body."})
    assert list(found.masks) == [f"body.{name}" for name in masks] and found.fresh == ["body2.bias", "body2.weight"]
    back = transfer(wrapped, {f"body.{n}": m for n, m in masks.items()}, net(), rename={"body.": ""})
    assert_equal(back.masks, masks)


def test_the_random_ticket_baseline():
    masks = masked(net())
    found = transfer(net(), masks, net())
    random = found.random(3)
    assert {n: int(m.sum()) for n, m in random.items()} == {n: int(m.sum()) for n, m in masks.items()}
    assert jaccard(random, masks) < 0.5 and jaccard(random, found.random(3)) == 1 != jaccard(random, found.random(4))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"exclude": "9"}, "Expected exclude to name parameters of the new model, got '9'"),
        ({"rename": {"net.": ""}}, r"Expected rename to name prefixes of the ticket's parameters, got 'net\.'"),
        ({"exclude": "*"}, r"Expected a masked layer of the ticket \(0\.weight, 5\.weight, 7\.weight\) with its name"),
    ],
)
def test_transfers_that_fit_nothing(how, message):
    with pytest.raises(ValueError, match=message):
        transfer(net(), masked(net()), net(), **how)
    with pytest.raises(ValueError, match=r"0\.weight: Expected a mask of shape"):
        transfer(net(), {"0.weight": torch.ones(2, 2, dtype=torch.bool)}, net())


def test_a_network_trained_elsewhere_is_the_beginning():
    """Any module with loaded weights is w0: its own values are what rounds go back to."""
    data = dataset()
    trained = nn.Sequential(nn.Flatten(), mlp(16, 32, 3))
    fit(trained, data, TRAINING, lambda n, e: torch.arange(n))
    first = {name: t.clone() for name, t in trained.state_dict().items()}
    *_, round_ = sk.tickets(trained, 2, 0.5, impl="csr")
    for name, mask in round_.masks.items():
        assert torch.equal(round_.model.get_submodule(name[:-7]).weight, first[name] * mask)


# Overlap and movement


def mask(*bits):
    return {"w": torch.tensor(bits, dtype=torch.bool)}


def test_overlaps_by_hand():
    a, b, none = mask(1, 1, 0, 0), mask(1, 0, 1, 0), mask(0, 0, 0, 0)
    assert jaccard(a, b) == pytest.approx(1 / 3) and jaccard(a, a) == 1 == jaccard(none, none)
    assert hamming(a, b) == 0.5 and hamming(a, a) == 0
    matrix = overlap({"a": a, "b": b, "none": none})
    torch.testing.assert_close(matrix, torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]], dtype=torch.float64))
    assert shared({"a": a, "b": b}) == 0.5 and shared({"a": a}) == 1
    with pytest.raises(ValueError, match=r"Expected masks of the same weights, got \['v'\]"):
        jaccard(a, a | {"v": a["w"]})
    with pytest.raises(ValueError, match=r"w: Expected masks of one shape, got \[4\] and \[2\]"):
        hamming(a, mask(1, 0))


def test_random_masks_overlap_as_said():
    model = nn.Linear(200, 200)
    masks = {str(i): sk.prune(model, 0.8, criterion="random") for i in range(3)}
    matrix = overlap(masks)
    assert torch.equal(matrix, matrix.T) and (matrix.diagonal() == 1).all()
    assert matrix[0, 1].item() == pytest.approx(0.2 / 1.8, rel=0.1)


def test_movement_by_hand_and_over_a_search():
    w0, w = {"w": torch.tensor([3.0, 4.0, 9.0])}, {"w": torch.tensor([3.0, -4.0, 0.0])}
    found = movement(w, w0, {"w": torch.tensor([True, True, False])})["w"]
    assert found == pytest.approx({"distance": 8, "relative": 1.6, "cosine": (9 - 16) / 25, "turned": 0.5})
    model = net()
    round_ = run(model, 1)[0][1][0]
    moved = movement(sk.to_dense(round_.model), model, round_.masks)
    assert moved.keys() == round_.masks.keys() and all(0 < m["relative"] < 10 for m in moved.values())
    still = movement(model, model, round_.masks)["5.weight"]
    assert still["distance"] == 0 and still["cosine"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"0\.weight: Expected a dense weight of shape \[4, 1, 3, 3\], got none"):
        movement(round_.model, model, round_.masks)


# Work


def test_positions_count_pixels_and_rows():
    model = net()
    assert positions(model, X[:2]) == {"0.weight": 2 * 16, "5.weight": 2, "7.weight": 2}
    masks = masked(model)
    fast = sk.convert(model, masks, impl="csr")
    assert positions(fast.train(), X[:2]) == positions(model, X[:2]) and fast.training
    assert fast[1].num_batches_tracked == 0
    counts = {"0.weight": 16, "5.weight": 1, "7.weight": 1}
    work = sum(counts[n] * int(m.sum()) for n, m in masks.items())
    assert flop_density(masks, counts) == pytest.approx(work / (16 * 36 + 1024 + 48))
    assert flop_density({}, {}) == 1


def test_positions_of_attention_and_conv1d():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 8, 3, padding=1)
            self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.body(self.conv(x).transpose(1, 2))

    model = Net()
    counts = positions(model, torch.randn(2, 3, 5))
    assert set(counts.values()) == {10} and len(counts) == 5 and counts.keys() == sk.prunable(model).keys()
    fast = sk.convert(model, sk.prune(model, 0.5, scope="layer"), impl="dense")
    assert set(positions(fast, torch.randn(2, 3, 5)).values()) == {10}


def test_a_search_says_both_densities():
    rows = run(rounds=1, rate={"*": 0.5, "0": 0.0}, example_inputs=X[:4])[1].summary["rounds"]
    assert rows[0]["flop_density"] == 1 and rows[1]["density"] < rows[1]["flop_density"] < 1
    assert rows[1]["flop_density"] == pytest.approx((16 * 36 + 512 + 24) / (16 * 36 + 1024 + 48))
    assert run(rounds=1)[1].summary["rounds"][1]["flop_density"] is None


def test_refilling_keeps_the_density_and_the_heaviest_groups():
    model = mlp(16, 32, 8)
    masks = masked(model, 0.75)
    for pattern in ("block:8x1", "block:4x4", "channel"):
        full = refill(model, masks, pattern)
        for name, mask in full.items():
            assert sk.Pattern.parse(pattern).holds(mask)
            assert density({name: mask}) == pytest.approx(density({name: masks[name]}), abs=0.13)
        assert (full["fc1.weight"] & ~masks["fc1.weight"]).any()  # what was dead inside a kept group is back
    weight = model.fc1.weight.detach().abs() * masks["fc1.weight"]
    kept = refill(model, masks, "channel")["fc1.weight"][:, 0]
    assert weight.sum(1)[kept].min() >= weight.sum(1)[~kept].max()
    with pytest.raises(ValueError, match="Expected a pattern of groups to refill, got '2:4'"):
        refill(model, masks, "2:4")


# Early birds


def bird(*scales):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    model[1].weight.data = torch.tensor(scales[:4])
    model[4].weight.data = torch.tensor(scales[4:])
    return model


def test_channels_of_least_scale_go_whatever_their_layer():
    masks = channel_masks(bird(0.1, -0.9, 0.5, 0.2, 0.05, 0.7), 0.5)
    assert masks["1.weight"].tolist() == [False, True, True, False] and masks["4.weight"].tolist() == [False, True]
    with pytest.raises(ValueError, match="Expected a model with affine batch norms, got Linear"):
        channel_masks(nn.Linear(2, 2), 0.5)


def test_an_early_bird_emerges_when_five_masks_agree():
    early = EarlyBird(0.5)
    moving, still = bird(0.9, 0.8, 0.7, 0.1, 0.2, 0.3), bird(0.1, 0.9, 0.5, 0.2, 0.05, 0.7)
    assert [early.update(m) for m in [moving, still, still, still, still]] == [False] * 5
    assert max(early.distances) == pytest.approx(2 / 6)
    assert early.update(still) and early.distances == [0] * 4
    ticket = early.ticket(still)
    assert {n: m.flatten(1).all(1).tolist() for n, m in ticket.items()} == {
        "0.weight": [False, True, True, False],
        "3.weight": [False, True],
    }
    assert all(sk.Pattern.parse("channel").holds(m) for m in ticket.values())
    fast = sk.convert(still.eval(), ticket, impl="compact")
    assert fast(torch.randn(1, 1, 8, 8)).shape == (1, 2, 4, 4)


@pytest.mark.parametrize("how", [{"share": 1.0}, {"share": -0.1}, {"window": 1}, {"distance": 1.5}])
def test_bad_birds(how):
    with pytest.raises(ValueError, match="Expected (share|window|distance)"):
        EarlyBird(**{"share": 0.5} | how)
    with pytest.raises(ValueError, match=r"Expected update\(\) before ticket\(\)"):
        EarlyBird(0.5).ticket(bird(*[0.1] * 6))
