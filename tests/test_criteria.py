"""Criteria against their formulas, what they may ask for, and steps, scopes and guards around them."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekit as sk
from sparsekit import criteria
from sparsekit.collapse import Compression, collapsed, critical_compression
from sparsekit.criteria import CRITERIA, Facts, Layer
from sparsekit.mask import density
from sparsekit.schedule import schedule

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def net(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def conv_net(seed=3, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


IMAGES = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(2))


def scores(name, model, weight="0.weight", alive=None, **facts):
    layers = sk.prunable(model)
    everything = {n: torch.ones_like(m.weight, dtype=torch.bool) for n, m in layers.items()}
    everything |= alive or {}
    known = Facts(model, layers, **facts)
    known.under(everything)
    return CRITERIA[name](Layer(weight, layers[weight].weight.detach(), everything[weight], known))


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


# Formulas


FIRST = torch.tensor([[0.5, -0.2, 0.1, -0.4]])
LAST = torch.tensor([[0.6, 0.3, -0.1, -0.2]])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("magnitude", [0.6, 0.3, 0.1, 0.2]),
        ("small_final", [-0.6, -0.3, -0.1, -0.2]),
        ("large_init", [0.5, 0.2, 0.1, 0.4]),
        ("small_init", [-0.5, -0.2, -0.1, -0.4]),
        ("large_init_large_final", [0.5, 0.2, 0.1, 0.2]),
        ("small_init_small_final", [-0.6, -0.3, -0.1, -0.4]),
        ("magnitude_increase", [0.1, 0.1, 0.0, -0.2]),
        ("movement", [0.1, 0.5, 0.2, 0.2]),
        ("large_final_same_sign", [0.6, -0.3, -0.1, 0.2]),
        ("large_final_diff_sign", [-0.6, 0.3, 0.1, -0.2]),
        ("movement_same_sign", [0.1, -0.5, -0.2, 0.2]),
        ("layer_l1", [0.5, 0.25, 1 / 12, 1 / 6]),
        ("layer_l2", [0.72, 0.18, 0.02, 0.08]),
        ("layer_softmax", torch.softmax(torch.tensor([0.6, 0.3, 0.1, 0.2]), 0).tolist()),
        ("layer_minmax", [1.0, 0.4, 0.0, 0.2]),
        ("lamp", [1.0, 0.09 / 0.45, 0.01 / 0.5, 0.04 / 0.49]),
    ],
)
def test_formulas_of_weights(name, want):
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = LAST.clone()
    got = scores(name, model, "weight", init={"weight": FIRST})
    torch.testing.assert_close(got.float(), torch.tensor([want]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["layer_l1", "layer_l2", "layer_softmax", "layer_minmax", "lamp"])
def test_importance_is_a_share_of_the_survivors(name):
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = LAST.clone()
    alive = torch.tensor([[False, True, True, True]])
    small = nn.Linear(3, 1, bias=False)
    small.weight.data = LAST[:, 1:].clone()
    got = scores(name, model, "weight", {"weight": alive})[:, 1:]
    torch.testing.assert_close(got, scores(name, small, "weight"), rtol=1e-6, atol=1e-7)


def loss_of(model, weights, x=X, y=Y):
    return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)


def test_gradients_and_curvature_are_those_of_the_masked_network():
    model = net().double()
    x, mask = X.double(), torch.rand(8, 6) < 0.5
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}
    weights["0.weight"] *= mask
    g = torch.func.grad(lambda w: loss_of(model, w, x))(weights)
    square = torch.func.grad(
        lambda w: 0.5 * sum(t.square().sum() for t in torch.func.grad(lambda v: loss_of(model, v, x))(w).values())
    )(weights)  # d(g'g/2)/dw = H g
    how = {"alive": {"0.weight": mask}, "data": (x, Y)}
    w = model[0].weight.detach()
    torch.testing.assert_close(scores("snip", model, **how), (w * g["0.weight"]).abs())
    torch.testing.assert_close(scores("taylor", model, **how), (w * g["0.weight"]).square())
    torch.testing.assert_close(scores("grasp", model, **how), w * square["0.weight"])


@pytest.mark.parametrize("name", ["snip", "grasp", "taylor", "wanda"])
def test_batches_add_up_to_their_whole(name):
    model = net().double()
    whole = scores(name, model, data=(X.double(), Y))
    parts = scores(name, model, data=zip(X.double().split(10), Y.split(10), strict=True))
    torch.testing.assert_close(parts, whole)
    first = scores(name, model, data=(X[:10].double(), Y[:10]))
    assert not torch.allclose(first, whole)  # more than one batch counts


def test_a_loss_of_ones_own():
    model = net()
    got = scores("snip", model, data=(X, X[:, :3]), loss=F.mse_loss)
    F.mse_loss(model(X), X[:, :3]).backward()
    torch.testing.assert_close(got, (model[0].weight * model[0].weight.grad).abs().detach())


def test_flow_is_that_of_absolute_weights_on_ones():
    model = net()
    a, b = (model[i].weight.detach().double().abs() for i in (0, 2))
    want = a * b.sum(0)[:, None]  # d 1'(b a 1) / da, times a
    got = scores("synflow", model, data=(X, Y))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want)
    last = scores("synflow", model, "2.weight", data=(X, Y))
    torch.testing.assert_close(last, b * (a.sum(1) + model[0].bias.detach().abs()))


def test_flow_is_conserved_from_layer_to_layer():
    """Theorem 1 of arXiv:2006.05467: without biases each layer's scores add up to the same."""
    model = nn.Sequential(*[m for w in (6, 8, 5) for m in (nn.Linear(w, {6: 8, 8: 5, 5: 4}[w], bias=False), nn.ReLU())])
    sums = [float(scores("synflow", model, f"{i}.weight", data=(X, Y)).sum()) for i in (0, 2, 4)]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)


def test_flow_stays_in_double_precision_under_autocast():
    """Scores under autocast lose the small ones (a defect of another tool)."""
    model, how = conv_net(), {"data": (IMAGES, Y[:12])}
    plain = scores("synflow", model, **how)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores("synflow", model, **how), plain) and plain.dtype == torch.float64


def test_flow_is_of_the_eval_mode_and_leaves_batch_norms_alone():
    model = conv_net().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    got = scores("synflow", model, data=(IMAGES, Y[:12]))
    assert torch.equal(got, scores("synflow", copy.deepcopy(model).eval(), data=(IMAGES, Y[:12])))
    scores("snip", model, data=(IMAGES, Y[:12]))
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_activations_of_convolutions_and_groups():
    model = conv_net().eval()
    seen = {}
    model[4].register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    model(IMAGES)
    rms = seen["x"].square().mean((0, 2, 3)).sqrt()  # per channel; two groups of two
    got = scores("wanda", model, "4.weight", data=(IMAGES, Y[:12]))
    want = model[4].weight.abs().detach() * rms.view(2, 1, 2).expand(2, 3, 2).reshape(6, 2, 1, 1)
    torch.testing.assert_close(got, want)


# Any model, sparse ones included, and nothing of it changes


@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_prunes_every_kind_of_model(name):
    model = conv_net().train()
    facts = {"init": conv_net(4), "data": (IMAGES, Y[:12])}
    masks = sk.prune(model, 0.5, criterion="random")
    pruned = copy.deepcopy(model)
    for weight, mask in masks.items():
        torch_prune.custom_from_mask(pruned.get_submodule(weight.removesuffix(".weight")), "weight", mask)
    pruned.eval()(IMAGES)  # leaves non-leaf weights behind
    pruned.train()
    sparse = sk.convert(model, masks, impl="csr")
    found = []
    for one in (pruned, sparse):
        state = {n: t.clone() for n, t in one.state_dict().items()}
        torch.manual_seed(5)
        rng = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found.append(sk.prune(one, 0.8, criterion=name, scope="layer", steps=1, **facts))
        assert name == "random" or torch.equal(rng, torch.get_rng_state())
        assert all(torch.equal(state[n], t) for n, t in one.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in one.parameters())
    for weight, mask in found[0].items():
        assert torch.equal(mask, found[1][weight]) and not (mask & ~masks[weight]).any()
        assert int(mask.sum()) == mask.numel() - math.floor(0.8 * mask.numel() + 0.5)


def test_dropout_does_not_move_the_generator():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    rng = torch.get_rng_state()
    sk.prune(model, 0.5, criterion="snip", data=(X, Y))
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "facts", "error", "message"),
    [
        ("movement", {}, ValueError, r"0\.weight: Expected init=, the model or state dict"),
        ("movement", {"init": {"0.weight": torch.ones(2, 2)}}, ValueError, r"weight of shape \[8, 6\], got \[2"),
        ("snip", {}, ValueError, r"Expected data=, a batch \(x, y\) or several, for this criterion, got none"),
        ("snip", {"data": []}, ValueError, "at least one in an iterable, got something else or none"),
        ("snip", {"data": X}, TypeError, "Expected data as a batch"),
        ("snip", {"data": [X]}, ValueError, "Expected data as a batch"),
        ("synflow", {"data": (torch.arange(6)[None], Y)}, ValueError, "one floating-point input .* got torch.int64"),
    ],
)
def test_what_is_missing_is_named(name, facts, error, message):
    with pytest.raises(error, match=message):
        sk.prune(net(), 0.5, criterion=name, **facts)


def test_a_criterion_of_ones_own_asks_by_reading(monkeypatch):
    monkeypatch.setitem(CRITERIA, "curious", None)
    calls = []

    @sk.criterion(steps=3)
    def curious(layer):
        calls.append((layer.name, int(layer.alive.sum())))
        return layer.grad.abs() + layer.init.abs() + layer.input_rms + layer.flow

    assert CRITERIA["curious"] is curious
    masks = sk.prune(net(), 0.5, criterion="curious", init=net(4), data=(X, Y))
    assert [name for name, _ in calls] == ["0.weight", "2.weight"] * 3
    assert calls[0][1] + calls[1][1] == 72 and sum(kept(masks).values()) == 36
    sk.prune(net(), 0.5, criterion="curious", init=net(4), data=(X, Y), steps=1)
    assert len(calls) == 8


# Steps, scopes, guards


def test_steps_go_down_geometrically_and_score_what_is_left():
    seen = []

    def watch(layer):
        seen.append(int(layer.alive.sum()))
        return layer.weight.abs()

    model = nn.Linear(100, 10, bias=False)
    mask = sk.prune(model, 0.99, criterion=watch, steps=4)["weight"]
    assert seen == [1000, 316, 100, 32] and int(mask.sum()) == 10
    assert torch.equal(mask, sk.prune(model, 0.99)["weight"])  # magnitude does not depend on what is left
    assert not sk.prune(model, 0.5, criterion="magnitude", steps=2)["weight"].all()
    with pytest.warns(UserWarning, match="no weight survives"):
        assert not sk.prune(model, 1.0, steps=3)["weight"].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.987, 1.0])
@pytest.mark.parametrize("scope", ["er", "erk"])
def test_erdos_renyi_counts_are_exact(sparsity, scope):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 5), nn.Flatten(), nn.Linear(128, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        masks = sk.prune(model, sparsity, criterion="random", scope=scope)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(kept(masks).values()) == total - math.floor(sparsity * total + 0.5)


def test_erdos_renyi_densities():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 1), nn.Flatten(), nn.Linear(512, 100))
    for scope, ratio in (("erk", lambda s: sum(s) / math.prod(s)), ("er", lambda s: sum(s[:2]) / math.prod(s[:2]))):
        masks = sk.prune(model, 0.95, scope=scope, criterion="random")
        scale = [density({n: m}) / ratio(m.shape) for n, m in masks.items()]
        assert scale == pytest.approx([scale[0]] * 3, rel=2e-3)
    dense_first = sk.prune(nn.Sequential(nn.Linear(3, 4), nn.Linear(200, 200)), 0.5, scope="er")
    assert dense_first["0.weight"].all()  # its share would exceed 1


def test_groups_of_layers_are_ranked_together():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    for i, module in enumerate(model):
        module.weight.data.mul_(10.0**i)
    masks = sk.prune(model, 0.5, scope=["[01]", ["2", "3"]])
    assert kept(masks)["0.weight"] + kept(masks)["1.weight"] == 64 > 2 * kept(masks)["0.weight"]
    assert kept(masks)["2.weight"] + kept(masks)["3.weight"] == 64 > 2 * kept(masks)["2.weight"]
    shares = sk.prune(model, {"*": 0.5, "3": 0.25, "2": 0.25}, scope=["[01]", ["2", "3"]])
    assert sum(list(kept(shares).values())[2:]) == 96
    with pytest.raises(ValueError, match="Expected one share for all layers of its group"):
        sk.prune(model, {"*": 0.5, "3": 0.25}, scope=["[01]", ["2", "3"]])
    with pytest.raises(ValueError, match=r"3\.weight: Expected a layer in exactly one group .* in 0"):
        sk.prune(model, 0.5, scope=["[012]"])
    with pytest.raises(ValueError, match=r"Expected groups of layers of this model .* got \['9'\]"):
        sk.prune(model, 0.5, scope=["*", "9"])


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "channel"])
def test_the_guard_keeps_the_best_of_every_layer(pattern):
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(3)])
    model[0].weight.data.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"0\.weight: no weight survives"):
        empty = sk.prune(model, 0.7, pattern, scope="global")
    assert collapsed(empty) == ["0.weight"]
    masks = sk.prune(model, 0.7, pattern, scope="global", least=1)
    assert collapsed(masks) == [] and 1 <= kept(masks)["0.weight"] <= 8
    assert abs(sum(kept(masks).values()) - 58) <= 4
    group = sk.Pattern.parse(pattern)
    ranks, _ = group.group_scores(model[0].weight.detach().abs(), torch.ones(8, 8, dtype=torch.bool))
    best = torch.zeros_like(ranks, dtype=torch.bool).scatter(0, ranks.argmax(), True)
    assert torch.equal(masks["0.weight"], group.expand(best, torch.Size([8, 8])))
    assert sum(kept(sk.prune(model, 1.0, pattern, scope="global", least=1)).values()) == 3 * kept(masks)["0.weight"]


def test_structures_are_ranked_per_layer_unless_said():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(2)])
    model[0].weight.data.mul_(1e-3)
    assert kept(sk.prune(model, 0.5, "block:4x1")) == {"0.weight": 32, "1.weight": 32}
    with pytest.warns(UserWarning, match="no weight survives"):
        assert kept(sk.prune(model, 0.5, "block:4x1", scope="global")) == {"0.weight": 0, "1.weight": 64}


@pytest.mark.parametrize("how", [{"steps": 0}, {"steps": True}, {"steps": 1.5}, {"least": -1}, {"least": 0.5}])
def test_bad_steps(how):
    with pytest.raises(ValueError, match=r"Expected (steps|least) as a whole number of at least"):
        sk.prune(net(), 0.5, **how)


# Layer collapse


def vgg_like():
    """A deep and uneven network: wide layers have small weights, and so does a trained VGG."""
    torch.manual_seed(0)
    widths = (3, 8, 8, 16, 32, 32)
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def test_global_magnitude_collapses_where_others_do_not():
    """The figure of arXiv:2006.05467 and 2302.11244 on a small net; layers count while they shrink, so in rounds."""
    model, batch = vgg_like(), (torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))
    found = critical_compression(model, "magnitude", steps=30)
    assert found.largest == 16088 / 6 and 2 < found.critical < 20
    for criterion in ("layer_l1", "layer_l2", "layer_minmax"):
        assert critical_compression(model, criterion, steps=30) == Compression(16088 / 6, 16088 / 6)
    assert critical_compression(model, "synflow", data=batch) == Compression(16088 / 6, 16088 / 6)
    with pytest.warns(UserWarning, match="no weight survives"):
        assert collapsed(sk.prune(model, 0.95))
    assert not collapsed(sk.prune(model, 0.999, criterion="synflow", data=batch))


def test_one_scoring_of_flow_collapses_and_a_hundred_do_not():
    """Scoring once is what TurboPrune calls SynFlow."""
    torch.manual_seed(0)
    widths = (20, 100, 100, 40, 10)
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:], strict=False)])
    batch = (torch.randn(2, 20), torch.tensor([0, 1]))
    once = critical_compression(model, "synflow", data=batch, steps=1)
    many = critical_compression(model, "synflow", data=batch)
    assert many.critical == many.largest == 16400 / 4
    assert once.critical < 0.5 * once.largest


def test_collapsed_needs_a_survivor_elsewhere():
    none, some = torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    assert collapsed({"a": none, "b": some}) == ["a"]
    assert collapsed({"a": none}) == collapsed({"b": some}) == collapsed({}) == []


# Schedules


def densities(rates):
    left = [1.0]
    for rate in rates:
        left.append(left[-1] * (1 - rate))
    return left[1:]


def test_schedules_end_where_they_should():
    for kind in ("geometric", "cubic", "linear"):
        assert densities(schedule(0.1, 5, kind))[-1] == pytest.approx(0.1)
    assert schedule(0.8**12, 12) == pytest.approx([0.2] * 12)
    assert schedule(0.1, 7, "one-shot") == pytest.approx([0.9])
    assert densities(schedule(0.2, 2, "cubic")) == pytest.approx([0.2 + 0.8 / 8, 0.2])
    assert densities(schedule(0.0, 2, "linear")) == pytest.approx([0.5, 0])
    each = schedule({"*": 0.25, "fc3": 0.5}, 2)
    assert each == [{"*": pytest.approx(0.5), "fc3": pytest.approx(1 - 0.5**0.5)}] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 5, "exponential"), "Expected a schedule of geometric, cubic, linear, one-shot, got 'exponential'"),
        ((0.1, 0), "Expected rounds as a whole number of at least 1, got 0"),
        ((1.5, 5), "Expected a density between 0 and 1, got 1.5"),
        ((0, 5), "Expected a density above 0 for a geometric schedule"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


def test_names_are_functions_with_a_sentence():
    for name, function in CRITERIA.items():
        assert function.__name__ == name and function.__doc__ and criteria.find(name) is function
