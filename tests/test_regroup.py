"""regroup and refill: better orders of rows, exactly; structured tickets from unstructured ones, honestly."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compaction import Net, close, nets, random_masks, same_state, sequential, settle
from torch import nn

import sparsekit as sk
from sparsekit.nn.rewiring import masked_copy
from sparsekit.panels import panel_union, row_order
from sparsekit.pattern import Pattern


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(net=nets, share=st.sampled_from([0.3, 0.6]), seed=st.integers(0, 999))
def test_random_networks(net, share, seed):
    torch.manual_seed(seed)
    model = settle(Net(**net, width=16), seed).double()
    masks = random_masks(model, share, seed, False)
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    grouping = sk.regroup(model, masks, x, rows=4)
    assert grouping.problem == ""
    dense, _ = masked_copy(model, masks)
    same_state(grouping.restore(), dense)
    same_state(grouping.permute(dense), grouping.model)
    for mode in (False, True):
        close(copy.deepcopy(grouping.model).train(mode)(x), copy.deepcopy(dense).train(mode)(x))
    for name, mask in grouping.masks.items():
        assert (grouping.model.get_parameter(name)[~mask] == 0).all() and mask.sum() == masks[name].sum()


def planted(rows, columns, groups, seed=0):
    """A mask whose rows come in groups of eight with the same columns, shuffled; and how they belong together."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.rand(groups, columns, generator=generator) < 0.1
    own = torch.arange(rows) % groups
    return kinds[own], own


def test_planted_panels_are_found():
    mask, own = planted(64, 200, 8)
    order = row_order(mask)
    assert sorted(order.tolist()) == list(range(64))
    assert all(len(set(own[order][i : i + 8].tolist())) == 1 for i in range(0, 64, 8))
    assert panel_union(mask[order]) == pytest.approx(float(mask.double().mean()))
    assert torch.equal(order, row_order(mask))


@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (8, 0), (0, 4), (19, 6), (12, 3, 3, 3)])
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_any_shape_has_an_order(shape, density):
    mask = torch.rand(shape) < density
    assert sorted(row_order(mask, 8).tolist()) == list(range(shape[0]))
    assert 0 <= panel_union(mask, 8) <= 1


def test_panel_union_by_hand():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert panel_union(mask, 2) == (2 + 1) / 8
    assert panel_union(mask[[0, 2, 1]], 2) == (2 + 2) / 8


def test_rows_are_grouped_and_the_output_keeps_its_order():
    mask, _ = planted(64, 32, 8)
    model = sequential(32, 64, 8)
    grouping = sk.regroup(model, {"0.weight": mask, "2.weight": torch.rand(8, 64) < 0.5})
    assert panel_union(grouping.masks["0.weight"]) < 0.5 * panel_union(mask)
    first, last = grouping.layers
    assert first.after < first.before and last.reason == "an output of the model"
    assert "an output of the model" in str(grouping) and "%" in str(grouping)
    x = torch.randn(5, 32)
    torch.testing.assert_close(grouping.model(x), grouping.restore()(x))


def test_a_trained_sparse_model_goes_back():
    mask, _ = planted(32, 16, 4)
    model = sequential(16, 32, 4)
    grouping = sk.regroup(model, {"0.weight": mask})
    fast = sk.convert(grouping.model, grouping.masks, impl="csr")
    optimizer = torch.optim.Adam(fast.parameters(), 0.1)
    for _ in range(3):
        fast(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
    back = grouping.restore(fast)
    assert (back[0].weight[~mask] == 0).all() and back[0].weight[mask].all()
    x = torch.randn(4, 16)
    torch.testing.assert_close(back(x), fast(x))


def test_bad_arguments_of_regroup():
    model = sequential(8, 16, 4)
    with pytest.raises(ValueError, match="Expected rows as a whole number of at least 2, got 1"):
        sk.regroup(model, {}, rows=1)
    with pytest.raises(ValueError, match="0.weight: Expected a mask of shape"):
        sk.regroup(model, {"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    grouping = sk.regroup(model, {"0.weight": planted(16, 8, 2)[0]})
    with pytest.raises(ValueError, match="0.weight: Expected a tensor of 16 x 8, got"):
        grouping.restore(sequential(8, 12, 4))


def test_untraceable_models_keep_their_order():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 16)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else -self.a(x)

    model = Branch()
    with pytest.warns(UserWarning, match="no row is moved, torch.fx cannot trace Branch"):
        grouping = sk.regroup(model, {"a.weight": torch.rand(16, 4) < 0.5}, torch.randn(2, 4))
    assert grouping.index == {} and "cannot trace" in str(grouping)


@pytest.mark.parametrize("pattern", ["block:8x1", "block:16x1", "block:4x4", "block:3x5", "channel", "2:4"])
@pytest.mark.parametrize("shape", [(24, 20), (17, 9), (16, 8, 3, 3)])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_refill_has_the_pattern_and_the_density(pattern, shape, density):
    weights, masks = {"w": torch.randn(shape)}, {"w": torch.rand(shape) < density}
    filled = sk.refill(weights, masks, pattern)["w"]
    known = Pattern.parse(pattern)
    assert known.holds(filled) and filled.shape == shape
    if not known.nm:
        whole = int(filled.numel() / filled.shape[0]) if pattern == "channel" else known.group[0] * known.group[1]
        assert abs(int(filled.sum()) - int(masks["w"].sum())) <= whole
        assert bool(filled.any()) == bool(masks["w"].any())


def test_refill_keeps_the_most_surviving_magnitude():
    weight = torch.tensor([[1.0, 9.0, 3.0, 2.0], [1.0, 9.0, 3.0, 2.0]])
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    filled = sk.refill({"w": weight}, {"w": mask}, "block:2x1")["w"]
    # Columns hold 2, 0 (the 9 is pruned), 3 and 2: the best, and of the tied the first, make up the four survivors.
    assert filled.tolist() == [[True, False, True, False]] * 2


def test_regrouped_refill_keeps_more():
    mask, _ = planted(64, 100, 8)
    model = sequential(100, 64, 4)
    weights = model.state_dict()
    plain = sk.refill(weights, {"0.weight": mask}, "block:8x1")["0.weight"]
    grouping = sk.regroup(model, {"0.weight": mask})
    better = sk.refill(grouping.model.state_dict(), grouping.masks, "block:8x1")["0.weight"]
    assert torch.equal(better, grouping.masks["0.weight"])  # planted vectors are found and kept whole
    assert (plain & mask).sum() < 0.6 * mask.sum()


def test_bad_arguments_of_refill():
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="w: Expected a weight for every mask"):
        sk.refill({}, {"w": mask}, "block:2x1")
    with pytest.raises(ValueError, match="w: Expected a mask of shape"):
        sk.refill({"w": torch.randn(3, 4)}, {"w": mask}, "block:2x1")
    with pytest.raises(ValueError, match="w: Expected floating-point weights without NaN"):
        sk.refill({"w": torch.full((4, 4), float("nan"))}, {"w": mask}, "block:2x1")
    with pytest.raises(ValueError, match="Expected a pattern"):
        sk.refill({"w": torch.randn(4, 4)}, {"w": mask}, "vector")


def test_norms_without_weights_and_modules_under_two_names_move_once():
    model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24, affine=False), nn.ReLU(), nn.Linear(24, 3)).eval()
    nn.init.normal_(model[1].running_mean)
    model, masks = Twice(model), {"body.0.weight": torch.rand(24, 16) < 0.3}
    grouping = sk.regroup(model, masks, torch.randn(4, 16))
    dense, _ = masked_copy(model, masks)
    assert grouping.problem == "" and any(not layer.reason for layer in grouping.layers)
    same_state(grouping.restore(), dense)
    same_state(grouping.permute(dense), grouping.model)


class Twice(nn.Module):
    """A body whose layers have a second name."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.again = self.body[0]

    def forward(self, x):
        return self.body(x)
