"""Stability to SGD noise: children, the line between them, the rewind point; and processes side by side."""

import math
import os
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from ticket_nets import TRAINING, dataset, mlp, net
from torch import nn

import sparsekit as sk
from sparsekit.nn import SparseModule
from sparsekit.ticket.stability import Branches, Instability, find_rewind, instability, rewind_point
from sparsekit.ticket.train import evaluate, fit
from sparsekit.ticket.workers import each

pytestmark = pytest.mark.usefixtures("one_thread")


def set_to(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_the_line_between_two_children_against_its_formula():
    model = nn.Linear(1, 1, bias=False)
    found = instability(
        model, lambda m, seed: set_to(m, float(seed)), lambda m: 1 - abs(m.weight.item() - 0.5), alphas=5, seed=0
    )
    assert found.alphas == (0, 0.25, 0.5, 0.75, 1)
    assert found.curves == ((0.5, 0.75, 1.0, 0.75, 0.5),)
    assert found.values == (0.5,) and found.value == 0.5 and not found.stable
    assert Instability((0, 1), ((0.1, 0.1), (0.3, 0.1)), 0.2).value == pytest.approx(0.05)
    assert Instability((0, 0.5, 1), ((0.1, 0.119, 0.1),)).stable
    assert not Instability((0, 0.5, 1), ((0, 0.02, 0),)).stable


def test_three_children_are_three_pairs_and_the_ends_are_exact():
    model, ends = net(), {}

    def train(m, seed):
        with torch.no_grad():
            for parameter in m.parameters():
                parameter.normal_()
        ends[seed] = m[0].weight.detach().clone()

    seen = []
    found = instability(model, train, lambda m: seen.append(m[0].weight.detach().clone()) or 0.0, 3, alphas=3)
    assert len(found.curves) == 3 and len(found.alphas) == 3
    for pair, (a, b) in enumerate([(0, 1), (0, 2), (1, 2)]):
        assert torch.equal(seen[3 * pair], ends[a]) and torch.equal(seen[3 * pair + 2], ends[b])
        torch.testing.assert_close(seen[3 * pair + 1], (ends[a] + ends[b]) / 2)


def test_children_are_seeded_everywhere_and_nothing_else_moves():
    def train(m, seed):
        drawn.append((torch.rand(1).item(), random.random(), numpy.random.rand()))  # noqa: NPY002

    model, drawn = net(), []
    state, before = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    instability(model, train, lambda m: 0.0, 2, alphas=2, seed=5)
    again = [drawn.copy(), drawn.clear()][0]
    instability(model, train, lambda m: 0.0, 3, alphas=2, seed=5)
    assert drawn[:2] == again and len(set(drawn)) == 3
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_batch_norm_statistics_are_mixed_and_may_be_estimated_anew():
    model, seen = nn.BatchNorm1d(2), []

    def train(m, seed):
        m.running_mean.fill_(seed)
        m.num_batches_tracked.fill_(7 + seed)

    def error(m):
        seen.append((float(m.running_mean[0]), int(m.num_batches_tracked)))
        return 0.0

    instability(model, train, error, alphas=3)
    assert seen == [(0.0, 7), (0.5, 7), (1.0, 8)]
    seen.clear()
    instability(model, train, error, alphas=3, recalibrate=lambda m: m.running_mean.fill_(9))
    assert [mean for mean, _ in seen] == [9, 9, 9]


@pytest.mark.parametrize("how", [{"children": 1}, {"children": True}, {"alphas": 1}, {"alphas": 2.5}])
def test_bad_counts(how):
    with pytest.raises(ValueError, match=r"Expected (children|alphas) as a whole number of at least 2"):
        instability(net(), None, None, **how)


# The point to rewind to


def table(values):
    calls = []

    def measure(step):
        calls.append(step)
        return Instability((0, 0.5, 1), ((0, values[step], 0),))

    return measure, calls


def test_the_rewind_point_is_the_first_stable_step():
    values = {0: 0.3, 10: 0.2, 50: 0.1, 100: 0.019, 200: 0.01, 400: 0.0, 800: 0.0}
    measure, calls = table(values)
    step, known = rewind_point(list(values), measure)
    assert step == 100 and {50, 100} <= known.keys() == set(calls) and len(calls) <= 3
    assert rewind_point([0, 10, 50], measure)[0] is None
    assert rewind_point([100, 200], measure)[0] == 100
    for steps in ([], [10, 0], [0, 0]):
        with pytest.raises(ValueError, match="Expected steps in ascending order"):
            rewind_point(steps, measure)


def test_branches_go_on_as_the_trunk_would_have():
    """A child with the trunk's own order ends in the trunk's bits: optimizer, schedule and step are back."""
    data, model = dataset(), mlp(16, 32, 3)
    model = nn.Sequential(nn.Flatten(), model)
    training = TRAINING.__class__(30, 20, "sgd", 0.1, 0.9, 1e-3, 10, warmup=5, milestones=(20,))
    branches = Branches(model, data, training, [0, 13, 30], seed=4)
    trunk = branches.at(0)
    branches.train(trunk, 0, seed=4)
    for step in (13, 30):
        child = branches.at(step)
        branches.train(child, step, seed=4)
        assert all(torch.equal(a, b) for a, b in zip(child.parameters(), trunk.parameters(), strict=True))
    other = branches.at(13)
    branches.train(other, 13, seed=5)
    assert not torch.equal(other[1].fc1.weight, trunk[1].fc1.weight)
    with pytest.raises(ValueError, match=r"Expected a step that was watched \(\[0, 13, 30\]\), got 7"):
        branches.at(7)
    with pytest.raises(ValueError, match="Expected steps between 0 and 30, got"):
        Branches(model, data, training, [31])


def test_instability_falls_with_the_step_and_tickets_stay_sparse():
    data = dataset()
    model = nn.Sequential(nn.Flatten(), mlp(16, 64, 3))
    training = TRAINING.__class__(200, 10, "sgd", 0.05, 0.9, eval_every=200)
    branches = Branches(model, data, training, [0, 20, 200])
    masks = sk.prune(model, 0.7, scope="layer")
    ticket = branches.at(20, masks)
    assert sum(isinstance(m, SparseModule) for m in ticket.modules()) == 2
    at_end = branches.instability(200, masks, alphas=3)
    assert at_end.value == 0 and len(set(at_end.curves[0])) == 1  # nothing left to differ in
    found = branches.instability(0, masks, children=3, alphas=5)
    assert len(found.curves) == 3 and all(0 <= e < 0.6 for curve in found.curves for e in curve)
    step, known = rewind_point([0, 20, 200], lambda k: branches.instability(k, alphas=4))
    assert step in (0, 20, 200) and known[step].stable


def test_augmentation_crops_and_mirrors():
    from sparsekit.ticket.train import _augmented

    x = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4) + 1
    torch.manual_seed(0)
    many = [_augmented(x, 1) for _ in range(200)]
    padded = F.pad(x, (1,) * 4)
    views = [[padded[i, :, t : t + 4, s : s + 4] for t in range(3) for s in range(3)] for i in range(2)]
    views = [[*v, *(w.flip(-1) for w in v)] for v in views]
    seen = [set(), set()]
    for y in many:
        for i in range(2):
            (found,) = [n for n, view in enumerate(views[i]) if torch.equal(view, y[i])]
            seen[i].add(found)
    assert [len(s) for s in seen] == [18, 18]  # every crop, mirrored and not, each image for itself
    torch.manual_seed(0)
    assert torch.equal(_augmented(x, 1), many[0])
    data = dataset()
    model = nn.Sequential(nn.Flatten(), mlp(16, 8, 3))
    training = TRAINING.__class__(10, 20, augment=1, eval_every=10)
    assert math.isfinite(fit(model, data, training, lambda n, e: torch.arange(n)).val_loss)


# Processes


def test_children_in_processes_are_the_same_to_the_bit():
    data, model = dataset(), nn.Sequential(nn.Flatten(), mlp(16, 32, 3))

    def train(m, seed):
        fit(m, data, TRAINING, lambda n, e: torch.randperm(n))

    def error(m):
        return 1 - evaluate(m, data.test_x, data.test_y)[1]

    one = instability(model, train, error, 3, alphas=4)
    assert instability(model, train, error, 3, alphas=4, workers=3) == one
    assert one.curves[0] != one.curves[1]


def test_results_come_back_in_order_with_their_types():
    def work(item):
        return {"item": item, "pid": os.getpid(), "t": (torch.full((2, 3), item / 3), [None, "x", 1.5])}

    found = each(work, iter(range(5)), workers=2)
    assert [row["item"] for row in found] == list(range(5)) and os.getpid() not in {row["pid"] for row in found}
    assert all(torch.equal(row["t"][0], torch.full((2, 3), i / 3)) for i, row in enumerate(found))
    assert found[0]["t"][1] == [None, "x", 1.5] and isinstance(found[0]["t"], tuple)
    assert each(work, [1])[0]["pid"] == os.getpid()


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        each(lambda item: 1 / item, [1, 0, 2], workers=2)
    with pytest.raises(RuntimeError, match=r"\(2 of 2 did not\), got\nexit code 3"):
        each(lambda item: os._exit(3), [1, 2], workers=2)
    with pytest.raises(ValueError, match="Expected workers as a whole number of at least 1, got 0"):
        each(len, [], workers=0)


def test_the_rewind_point_in_one_call():
    data = dataset()
    model = nn.Sequential(nn.Flatten(), mlp(16, 32, 3))
    training = TRAINING.__class__(32, 10, "sgd", 0.05, 0.9, eval_every=32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    step, known = find_rewind(model, data, training, alphas=3)
    assert set(known) <= {0, 1, 2, 4, 8, 16} and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert step is None or known[step].stable and all(not known[k].stable for k in known if k < step)
    assert find_rewind(model, data, training, [0, 32], sk.prune(model, 0.5), alphas=3)[0] in (0, 32)
    row = known[max(known)].row(7)
    assert row["step"] == 7 and len(row["alphas"]) == 3 and row["value"] == known[max(known)].value
