"""Patterns, masks and selection: exact counts, order of ties, and what may be pruned at all."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import sparsekit as sk
from sparsekit.mask import check_masks, density, digest, pack_bits, unpack_bits
from sparsekit.pattern import Pattern
from sparsekit.prune import CRITERIA, prune_step

few = settings(max_examples=30, deadline=None, derandomize=True)
shapes = st.one_of(
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
)
GROUPED = ["unstructured", "block:2x2", "block:8x1", "block:1x4", "block:3x5", "channel"]


def layer(weight):
    """A layer that holds this very weight."""
    weight = torch.as_tensor(weight)
    if weight.dim() == 2:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
    made.weight = nn.Parameter(weight)
    return made


def mlp(*widths):
    return nn.Sequential(*[nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])


def quiet_prune(*args, **kwargs):
    """Tiny layers are often emptied, which warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return sk.prune(*args, **kwargs)


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


# ---- exact counts -----------------------------------------------------------------------------------


@few
@given(st.lists(shapes, min_size=1, max_size=3), st.floats(0, 1), st.sampled_from(["global", "layer"]))
def test_counts_are_exact(sizes, sparsity, scope):
    model = nn.Sequential(*[layer(torch.randn(size)) for size in sizes])
    masks = quiet_prune(model, sparsity, scope=scope)
    totals = {name: mask.numel() for name, mask in masks.items()}
    if scope == "layer":
        assert kept(masks) == {name: n - math.floor(sparsity * n + 0.5) for name, n in totals.items()}
    else:
        n = sum(totals.values())
        assert sum(kept(masks).values()) == n - math.floor(sparsity * n + 0.5)


@few
@given(shapes, st.floats(0, 1))
def test_the_largest_survive(size, sparsity):
    weight = torch.randn(size)
    mask = quiet_prune(layer(weight), sparsity)["weight"]
    if mask.any() and not mask.all():
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


@few
@given(shapes, st.floats(0, 1), st.sampled_from(GROUPED))
def test_grouped_counts_are_the_nearest_that_groups_allow(size, sparsity, pattern):
    mask = quiet_prune(layer(torch.randn(size)), sparsity, pattern)["weight"]
    assert Pattern.parse(pattern).holds(mask)
    rows, cols = (1, mask[0].numel()) if pattern == "channel" else Pattern.parse(pattern).group
    wrong = abs(mask.numel() - int(mask.sum()) - math.floor(sparsity * mask.numel() + 0.5))
    assert wrong <= rows * cols / 2


def test_ties_go_by_layer_then_index():
    model = nn.Sequential(layer(torch.ones(2, 3)), layer(-torch.ones(2, 3)))
    masks = sk.prune(model, 4 / 12)
    assert masks["0.weight"].flatten().tolist() == [False] * 4 + [True] * 2
    assert masks["1.weight"].all()
    assert not sk.prune(model, 0.5, "channel", scope="layer")["1.weight"][0].any()


def test_scope():
    model = nn.Sequential(layer(torch.full((4, 4), 2.0)), layer(torch.full((4, 4), 1.0)))
    with pytest.warns(UserWarning, match="1.weight: no weight survives") as caught:
        together = sk.prune(model, 0.5)
    assert caught[0].filename == __file__  # the warning points at the caller
    assert kept(together) == {"0.weight": 16, "1.weight": 0}
    assert kept(sk.prune(model, 0.5, scope="layer")) == {"0.weight": 8, "1.weight": 8}


def test_shares_by_layer():
    model = mlp(10, 10, 10, 10)
    masks = sk.prune(model, {"*": 0.9, "1": 0.5, "2.weight": 0}, scope="layer")
    assert kept(masks) == {"0.weight": 10, "1.weight": 50, "2.weight": 100}


def test_exclude():
    model = mlp(4, 4, 4, 4)
    assert list(sk.prune(model, 0.5, exclude=("1", "2.*"))) == ["0.weight"]
    assert list(sk.prunable(model, "0")) == ["1.weight", "2.weight"]  # a lone string is one pattern


def test_density_of_the_paper():
    """LeNet-300-100: 20 % of each layer a round, 10 % of the last (Frankle & Carbin, figure 3)."""
    model, masks, left = mlp(784, 300, 100, 10), {}, [235200, 30000, 1000]
    remaining = {}
    for k in range(1, 20):
        masks = prune_step(model, masks, {"*": 0.2, "2.*": 0.1})
        left = [n - math.floor(n * rate + 0.5) for n, rate in zip(left, (0.2, 0.2, 0.1), strict=True)]
        assert list(kept(masks).values()) == left
        remaining[k] = round(100 * density(masks), 1)
    assert [remaining[k] for k in (3, 7, 9, 15, 19)] == [51.3, 21.1, 13.5, 3.6, 1.5]


# ---- patterns ---------------------------------------------------------------------------------------


@few
@given(shapes, st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 4), (1, 5)]))
def test_n_of_every_m_inputs(size, nm):
    n, m = nm
    weight = torch.randn(size)
    pattern = Pattern.parse(f"{n}:{m}")
    mask = sk.prune(layer(weight), pattern=pattern)["weight"]
    assert pattern.holds(mask)
    for start in range(0, size[1], m):
        group, scores = mask[:, start : start + m], weight[:, start : start + m].abs()
        width = group.shape[1]
        assert (group.sum(1) == min(n, width)).all()
        kth = scores.sort(1, descending=True).values[:, min(n, width) - 1 : min(n, width)]
        assert torch.equal(group, scores >= kth)


def test_blocks_lie_within_one_tap_of_a_kernel():
    weight = torch.ones(4, 4, 2, 2)
    weight[2:, :2, 0, 1] = 0.1  # one block of one tap
    mask = sk.prune(layer(weight), 4 / weight.numel(), "block:2x2")["weight"]
    assert torch.equal(mask, weight == 1)


def test_ragged_blocks_are_ranked_by_their_mean():
    weight = torch.full((3, 3), 1.0)
    weight[2, 2] = 2.0  # a corner block of one weight, with a smaller sum than its neighbours
    mask = sk.prune(layer(weight), 4 / 9, "block:2x2")["weight"]
    assert mask.tolist() == [[False, False, True], [False, False, True], [True, True, True]]


def test_channel_removes_whole_outputs():
    weight = torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 2, 3, 3).clone()
    mask = sk.prune(layer(weight), 0.5, "channel")["weight"]
    assert mask.flatten(1).all(1).tolist() == mask.flatten(1).any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("pattern", ["block:2x2", "1:2", "2:4", "channel"])
def test_holds_can_say_no(pattern):
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 1] = False
    assert not Pattern.parse(pattern).holds(mask)
    assert Pattern.parse("unstructured").holds(mask)


@pytest.mark.parametrize("text", ["", "block", "block:0x2", "block:2x-1", "4:2", "0:4", "2x2", "Channel", None, 3])
def test_unknown_patterns(text):
    with pytest.raises(ValueError, match=r"Expected a pattern 'unstructured'.*, got "):
        sk.Pattern.parse(text)


def test_pattern_prints_as_it_was_written():
    assert str(sk.Pattern.parse("block:16x1")) == "block:16x1"
    assert sk.Pattern.parse(sk.Pattern.parse("2:4")).nm == (2, 4)


# ---- criteria ---------------------------------------------------------------------------------------


def test_random_follows_the_seed_and_not_the_weights():
    model = mlp(20, 20)
    torch.manual_seed(1)
    first = sk.prune(model, 0.5, criterion="random")["0.weight"]
    torch.manual_seed(1)
    assert torch.equal(first, sk.prune(model, 0.5, criterion="random")["0.weight"])
    assert not torch.equal(first, sk.prune(model, 0.5, criterion="random")["0.weight"])
    assert int(first.sum()) == 200


def test_a_criterion_of_ones_own(monkeypatch):
    monkeypatch.setitem(CRITERIA, "smallest", None)  # forgotten after the test

    @sk.criterion
    def smallest(layer):
        assert layer.name == "weight" and not layer.weight.requires_grad
        return -layer.weight.abs()

    model = layer(torch.arange(1.0, 9).view(2, 4))
    by_name = sk.prune(model, 0.5, criterion="smallest")["weight"]
    assert torch.equal(by_name, sk.prune(model, 0.5, criterion=smallest)["weight"])
    assert torch.equal(by_name, model.weight <= 4)


def test_infinite_scores_protect():
    weight = torch.ones(4, 4)
    protect = torch.zeros(4, 4)
    protect[1] = torch.inf
    for pattern in ("unstructured", "block:2x2", "channel"):
        mask = sk.prune(layer(weight), 0.5, pattern, criterion=lambda _: protect)["weight"]
        assert mask[1].all()
    pruned = layer(weight)
    torch_prune.custom_from_mask(pruned, "weight", protect == 0)  # those with infinite scores are gone already
    mask = sk.prune(pruned, 0.5, "block:2x2", criterion=lambda _: protect)["weight"]
    assert int(mask[0].sum()) == 0 and mask[2:].all()


@pytest.mark.parametrize(
    ("scores", "got"), [(torch.ones(2, 2), r"\[2, 2\]"), (None, "NoneType"), (torch.full((3, 4), torch.nan), "NaN")]
)
def test_bad_scores_name_the_layer(scores, got):
    with pytest.raises(ValueError, match=rf"^1\.weight: Expected scores .*, got {got}"):
        sk.prune(mlp(4, 4, 3), 0.5, criterion=lambda layer: scores if layer.name[0] == "1" else layer.weight)


# ---- models that are pruned already -----------------------------------------------------------------


def test_prune_step_keeps_the_pruned_pruned():
    model, masks = mlp(30, 20, 10), {}
    for _ in range(5):
        with torch.no_grad():
            for module in model:
                module.weight.normal_()  # training could have made the pruned weights the largest
        before, masks = masks, prune_step(model, masks, 0.3, scope="global")
        assert all(not (masks[name] & ~before[name]).any() for name in before)
    left = 800
    for _ in range(5):
        left -= math.floor(left * 0.3 + 0.5)
    assert sum(kept(masks).values()) == left


def test_a_share_counts_what_is_gone():
    model = layer(torch.randn(10, 10))
    mask = torch.ones(10, 10, dtype=torch.bool)
    mask[:3] = False
    torch_prune.custom_from_mask(model, "weight", mask)
    again = sk.prune(model, 0.5)["weight"]
    assert int(again.sum()) == 50 and not (again & ~mask).any()
    assert torch.equal(sk.prune(model, 0.2)["weight"], mask)  # nothing revives
    converted = sk.convert(model, impl="csr")
    assert torch.equal(sk.prune(converted, 0.5)["weight"], again)


def test_zeros_are_ordinary_weights():
    assert int(sk.prune(layer(torch.zeros(4, 4)), 0.25)["weight"].sum()) == 12


def test_the_model_is_left_alone():
    model = mlp(8, 8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    sk.prune(model, 0.5)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and model[0].weight.grad is None


def test_what_is_prunable():
    class Mine(nn.Linear):
        pass

    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "plain": shared,
            "again": shared,
            "mine": Mine(4, 4),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "conv": nn.Conv2d(3, 4, 3),
            "deep": nn.Sequential(nn.ReLU(), nn.Linear(4, 2)),
            "line": nn.Conv1d(3, 4, 3),
        }
    )
    assert list(sk.prunable(model)) == ["plain.weight", "conv.weight", "deep.1.weight", "line.weight"]
    assert list(sk.prunable(nn.Linear(2, 2))) == ["weight"]


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, r"0\.weight: Expected a share between 0 and 1, got 1\.5"),
        ({"sparsity": -0.1}, "between 0 and 1, got -0.1"),
        ({"sparsity": float("nan")}, "between 0 and 1, got nan"),
        ({"sparsity": True}, "between 0 and 1, got True"),
        ({"sparsity": "0.9"}, "between 0 and 1, got '0.9'"),
        ({"sparsity": {"*": 0.5}}, "Expected one share with scope='global'"),
        ({"sparsity": {"0": 0.5}, "scope": "layer"}, r"1\.weight: Expected a share for every layer"),
        ({"sparsity": {"*": 0.5, "fc": 1}, "scope": "layer"}, r"layers of this model .*1\.weight\), got 'fc'"),
        ({"pattern": "blocks"}, "Expected a pattern .* got 'blocks'"),
        ({"criterion": "hessian"}, "Expected a criterion of magnitude, random, .* or a function, got 'hessian'"),
        ({"scope": "model"}, "Expected scope 'global', 'layer', 'er', 'erk' or groups of patterns, got 'model'"),
        ({"exclude": ("2",)}, r"Expected exclude to name prunable layers \(0\.weight, 1\.weight\), got \['2'\]"),
        ({"exclude": "*"}, "Expected a model with layers to prune"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sk.prune(mlp(4, 4, 4), **arguments)


def test_bad_weights_name_the_layer():
    model = mlp(4, 4, 4)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.weight: .*got NaN"):
        sk.prune(model, 0.5)
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"1\.weight: Expected a floating-point weight, got torch\.int8"):
        sk.prune(model, 0.5)
    with pytest.raises(ValueError, match="Expected a model with layers to prune"):
        sk.prune(nn.ReLU(), 0.5)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([1], TypeError, "Expected masks as a dict"),
        ({"w": torch.ones(2, 3)}, TypeError, "w: Expected a mask of dtype torch.bool, got torch.float32"),
        ({"w": [True]}, TypeError, "w: Expected a mask of dtype torch.bool, got list"),
        ({"w": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"w: Expected a mask of shape \[2, 3\], got \[3, 2\]"),
        ({"v": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"prunable weights of this model \(w\), got 'v'"),
    ],
)
def test_bad_masks(masks, error, message):
    with pytest.raises(error, match=message):
        check_masks(masks, {"w": torch.Size([2, 3])})


# ---- bits -------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 2**16))
def test_bits_round_trip(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == math.ceil(mask.numel() / 8)
    assert torch.equal(unpack_bits(bits, mask.shape), mask)


def test_bits_are_least_significant_first():
    assert pack_bits(torch.tensor([True, False, False, False, False, False, False, True, True])).tolist() == [129, 1]


def test_bits_of_the_wrong_size_are_refused():
    with pytest.raises(ValueError, match=r"Expected 2 mask bytes for shape \[3, 3\], got 1"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), [3, 3])


def test_digest_sees_names_shapes_and_bits_but_not_order():
    a, b = torch.ones(2, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    reference = digest({"a": a, "b": b})
    assert reference == digest({"b": b.clone(), "a": a.clone()})
    flipped = a.clone()
    flipped[1, 2] = False
    others = [{"a": a, "c": b}, {"a": a.view(3, 2), "b": b}, {"a": flipped, "b": b}, {"a": a}]
    assert len({reference, *map(digest, others)}) == 5
