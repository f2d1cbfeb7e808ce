"""Whole models in and out of sparse layers."""

import copy
import re
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsekit as sk
from sparsekit import plan
from sparsekit.nn import SparseModule, dense_state

planning = sys.modules["sparsekit.nn.planning"]


@pytest.fixture(autouse=True)
def _steady_choice(monkeypatch):
    """Each layer goes to csr where it is allowed: the choice itself is tested in test_plan.py."""

    def choose(thunks, key=None):
        for thunk in thunks.values():
            thunk()
        times = {name: 10.0 if name == "csr" else 100.0 for name in thunks}
        return min(times, key=times.get), times

    monkeypatch.setattr(planning, "choose", choose)
    monkeypatch.setattr(planning, "recall", lambda key: None)


class Net(nn.Module):
    """A small net with batch norm, dropout and two inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))) * scale


def images(n=2):
    return torch.randn(n, 3, 8, 8)


def masked(model, masks):
    """The dense model with the same weights pruned."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def sparse_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseModule)]


# ---- where masks come from --------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "dense", "csr"])
@pytest.mark.parametrize("training", [False, True])
def test_from_masks(impl, training):
    model = Net().eval()
    masks, before = sk.prune(model, 0.7), snapshot(model)
    fast = sk.convert(model, masks, images(), training, impl)
    x = images()
    assert torch.allclose(fast(x), masked(model, masks)(x), atol=1e-5)
    assert sparse_layers(fast) == ["conv", "head"] and sparse_layers(model) == []
    assert unchanged(model, before)
    assert all(torch.equal(mask, masks[name]) for name, mask in sk.masks_of(fast).items())


def test_from_torch_prune():
    model = Net().eval()
    torch_prune.l1_unstructured(model.conv, "weight", 0.6)
    torch_prune.random_unstructured(model.head, "weight", 0.5)
    x = images()
    want = model(x)  # leaves a weight with a history behind
    history = model.conv.weight.grad_fn
    fast = sk.convert(model)
    assert model.conv.weight.grad_fn is history is not None
    assert torch.allclose(fast(x), want, atol=1e-5)
    assert torch.equal(fast.conv.survivors(), model.conv.weight_mask != 0)
    assert {*sk.to_dense(fast).state_dict()} == {*Net().state_dict()}


def test_from_zeros():
    model = masked(Net().eval(), masks := {"head.weight": torch.rand(4, 8) < 0.5})
    fast = sk.convert(model)
    assert sparse_layers(fast) == ["head"] and type(fast.conv) is nn.Conv2d
    assert torch.equal(fast.head.survivors(), masks["head.weight"])


def test_again_with_another_mask():
    model = Net().eval()
    first = sk.convert(model, sk.prune(model, 0.5), impl="csr")
    second = sk.convert(first, sk.prune(first, 0.8), impl="dense")
    assert sk.explain(second).layers[0].chosen == "dense"
    for name, mask in sk.masks_of(second).items():
        assert not (mask & ~sk.masks_of(first)[name]).any()
    x = images()
    assert torch.allclose(second(x), sk.to_dense(second)(x), atol=1e-5)


# ---- example inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example",
    [lambda x: x, lambda x: (x,), lambda x: (x, 2.0), lambda x: {"x": x, "scale": 2.0}],
    ids=["tensor", "tuple", "two", "dict"],
)
def test_example_inputs(example):
    model = Net()
    fast = sk.convert(model, sk.prune(model, 0.5), example(images(3)))
    assert [layer.input_shape for layer in sk.explain(fast).layers] == [(3, 3, 8, 8), (3, 8)]


@pytest.mark.parametrize("inplace", [False, True])
def test_planning_leaves_no_trace(inplace):
    model = Net().train()
    model.drop.eval()
    masks, x = sk.prune(model, 0.5), images()
    before, rng = snapshot(model.norm), torch.get_rng_state()
    fast = sk.convert(model, masks, x, training=True, inplace=inplace)
    assert torch.equal(rng, torch.get_rng_state())
    assert unchanged(fast.norm, before) and unchanged(model.norm, before)
    assert (fast.training, fast.norm.training, fast.drop.training, fast.conv.training) == (True, True, False, True)
    assert all(p.grad is None for p in fast.parameters()) and x.grad is None
    assert not fast.conv._forward_pre_hooks and not model.conv._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_planning_draws_no_random_numbers():
    class Sampler(Net):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    model = Sampler()
    masks, x, rng = sk.prune(model, 0.5), images(), torch.get_rng_state()
    sk.convert(model, masks, x)
    assert torch.equal(rng, torch.get_rng_state())


def test_a_layer_that_the_example_does_not_reach_is_measured_on_an_assumed_input():
    class Half(Net):
        def forward(self, x):
            return self.conv(x)

    model = Half()
    conv, head = sk.explain(sk.convert(model, sk.prune(model, 0.5, scope="layer"), images())).layers
    assert not conv.assumed and head.assumed


def test_training_plans_need_no_gradient():
    model = Net().requires_grad_(False)
    fast = sk.convert(model, sk.prune(model, 0.5), images(), training=True)
    assert not any(p.requires_grad for p in fast.parameters())


# ---- what it does to a model ------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "compact", "csr"])
def test_inplace(impl):
    model = Net()
    masks = sk.prune(model, 0.5, "channel", scope="layer")
    bias, norm = model.conv.bias.detach().clone(), model.norm
    assert sk.convert(model, masks, impl=impl, inplace=True) is model
    assert sparse_layers(model) == ["conv", "head"] and model.norm is norm
    assert torch.equal(model.conv.bias, bias)
    assert sk.to_dense(model, inplace=True) is model and sparse_layers(model) == []


def test_the_root_itself():
    layer = nn.Linear(6, 4)
    mask = torch.rand(4, 6) < 0.5
    fast = sk.convert(layer, {"weight": mask})
    assert isinstance(fast, sk.SparseLinear) and torch.equal(sk.masks_of(fast)["weight"], mask)
    dense = sk.to_dense(fast)
    assert type(dense) is nn.Linear and torch.equal(dense.weight, torch.where(mask, layer.weight, 0))


def test_a_reused_module_stays_one():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleDict({"again": shared}))
    fast = sk.convert(model, {"0.weight": torch.rand(6, 6) < 0.5}, impl="csr")
    assert fast[0] is fast[2] is fast[3]["again"] and isinstance(fast[0], sk.SparseLinear)
    dense = sk.to_dense(fast)
    assert dense[0] is dense[2] is dense[3]["again"]


@pytest.mark.parametrize("pruned", [False, True])
def test_tied_weights_are_refused(pruned):
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "out": nn.Linear(5, 7)})
    model.out.weight = model.embed.weight
    masks = {"out.weight": torch.rand(7, 5) < 0.5}
    if pruned:
        torch_prune.custom_from_mask(model.out, "weight", masks["out.weight"])
    message = "out.weight: Expected a weight of its own, got one shared by embed.weight and out.weight"
    with pytest.raises(ValueError, match=message):
        sk.convert(model, masks, inplace=True)
    assert type(model.out) is nn.Linear and sparse_layers(model) == []


def test_hooks_are_kept():
    model = nn.Sequential(nn.Linear(6, 4))
    seen = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda module, args, kwargs, y: seen.append("after"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    fast = sk.convert(model, impl="csr")
    assert len(fast[0]._forward_pre_hooks) == 1  # without that of torch.nn.utils.prune
    for one in (fast, sk.to_dense(fast)):
        seen.clear()
        one(torch.randn(2, 6, requires_grad=True)).sum().backward()
        assert seen == ["before", "after", "backward"]


def test_subclasses_are_left_alone():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[1].weight[0] = 0
    fast = sk.convert(model)
    assert type(fast[0]) is Mine and type(fast[1]) is sk.SparseLinear
    with pytest.raises(ValueError, match=r"0\.weight: Expected .* pruned, got one that is not a plain torch layer"):
        sk.convert(model, {"0.weight": torch.ones(4, 4) > 0})


def test_full_layers_are_left_alone():
    model = Net()
    masks = {"conv.weight": torch.ones(8, 3, 3, 3) > 0, "head.weight": torch.rand(4, 8) < 0.5}
    assert sparse_layers(sk.convert(model, masks)) == ["head"]


@pytest.mark.parametrize("impl", ["auto", "dense", "csr"])
def test_an_emptied_layer_outputs_its_bias(impl):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    empty = {"0.weight": torch.zeros(4, 3, 3, 3) > 0, "2.weight": torch.zeros(2, 4) > 0}
    with pytest.warns(UserWarning, match=r"^[02]\.weight: no weight survives; the layer outputs its bias") as caught:
        fast = sk.convert(model, empty, torch.randn(5, 3, 3, 3), training=True, impl=impl)
    assert len(caught) == 2 and caught[0].filename == __file__
    y = fast(torch.randn(5, 3, 3, 3))
    assert torch.equal(y, model[2].bias.expand(5, 2))
    y.sum().backward()
    assert torch.equal(fast[2].bias.grad, torch.full((2,), 5.0))


def test_dense_layers_that_a_sparse_one_would_not_shrink(monkeypatch):
    """Never bigger than dense, however fast."""
    model = nn.Sequential(nn.Linear(64, 64))
    (layer,) = sk.explain(sk.convert(model, {"0.weight": torch.rand(64, 64) < 0.9})).layers
    assert layer.chosen == "dense" and "x the memory of dense" in layer.rejected["csr"]
    (layer,) = sk.explain(sk.convert(model, {"0.weight": torch.rand(64, 64) < 0.1})).layers
    assert layer.chosen == "csr"


def test_a_layer_may_be_bigger_while_the_model_is_not():
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    for densities, chosen in (((0.6, 0.1, 0.55), ["csr"] * 3), ((0.6, 0.4, 0.55), ["dense", "csr", "csr"])):
        masks = {f"{2 * i}.weight": torch.rand(256, 256) < density for i, density in enumerate(densities)}
        layers = sk.explain(fast := sk.convert(model, masks)).layers
        assert [layer.chosen for layer in layers] == chosen
        assert sum(module.bytes() for module in fast.modules() if isinstance(module, sk.SparseLinear)) <= dense
    assert re.match(r"the model would hold 1.\d\dx its dense bytes", layers[0].rejected["csr"])


@pytest.mark.parametrize("name", ["0", "0.weight"])
def test_impl_names_a_layer_or_its_weight(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fast = sk.convert(model, sk.prune(model, 0.5), impl={name: "csr", "1": "dense"})
    assert [layer.format.name for layer in fast] == ["csr", "dense"]


# ---- forced formats and bad input -------------------------------------------------------------------


def test_a_forced_format_without_a_kernel_here_says_so():
    model = nn.Sequential(nn.Linear(128, 128))
    masks = sk.prune(model, pattern="2:4")
    with pytest.warns(UserWarning, match="^0: no 2:4 kernel on the CPU, so 'nm' runs as a dense product here"):
        sparse = sk.convert(model, masks, impl="nm")
    x = torch.randn(3, 128)
    torch.testing.assert_close(sparse(x), nn.functional.linear(x, model[0].weight * masks["0.weight"], model[0].bias))
    plan = sk.explain(sk.convert(model, masks)).layers[0]
    assert plan.rejected["nm"] == "no 2:4 kernel on the CPU"


def test_a_forced_format_is_taken_or_refused():
    model = Net()
    masks = sk.prune(model, 0.5, scope="layer")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"head\.weight: .*'compact' can hold, got no dead input or output unit"):
        sk.convert(model, {"head.weight": ~torch.eye(4, 8).bool()}, impl="compact", inplace=True)
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match=r"weight: .*'compact' can hold, got grouped convolution"):
        sk.convert(grouped, sk.prune(grouped, 0.5, "channel"), impl="compact")
    for bad in ("coo", None, ["csr"]):
        with pytest.raises(ValueError, match="Expected impl .auto. or a format of dense, compact, csr, .*nm, got"):
            sk.convert(model, masks, impl=bad)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"body.weight": torch.ones(4, 8) > 0}, ValueError, r"conv\.weight, head\.weight\), got 'body\.weight'"),
        ({"head.weight": torch.ones(8, 4) > 0}, ValueError, r"head\.weight: Expected a mask of shape \[4, 8\]"),
        ({"head.weight": torch.ones(4, 8)}, TypeError, r"head\.weight: Expected a mask of dtype torch\.bool"),
        ([], TypeError, "Expected masks as a dict"),
    ],
)
def test_bad_masks_change_nothing(masks, error, message):
    model = Net()
    good = {"conv.weight": torch.rand(8, 3, 3, 3) < 0.5}
    with pytest.raises(error, match=message):
        sk.convert(model, good | masks if isinstance(masks, dict) else masks, inplace=True)
    assert sparse_layers(model) == []


def test_bad_examples_change_nothing():
    model = Net().train()
    model.norm.eval()
    with pytest.raises(RuntimeError):
        sk.convert(model, sk.prune(model, 0.5), torch.randn(2, 4, 8, 8), inplace=True)
    assert sparse_layers(model) == [] and not model.conv._forward_pre_hooks
    assert model.conv.training and not model.norm.training


def test_weights_that_are_no_floats():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"0\.weight: Expected a floating-point weight, got torch\.int8"):
        sk.convert(model, {"0.weight": torch.eye(2) > 0})


# ---- back again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["dense", "compact", "csr"])
def test_to_dense_gives_everything_back(impl):
    model = Net()
    with torch.no_grad():
        model.head.weight[1, 2] = -0.0
        model.head.weight[3, 3] = 1e-42  # a subnormal
    model.head.weight.requires_grad_(False)
    masks = sk.prune(model, 0.5, "channel", scope="layer")
    masks["head.weight"][1] = True
    masks["head.weight"][0] = False
    fast = sk.convert(model, masks, impl=impl)
    dense, want = sk.to_dense(fast), masked(model, {})
    assert [type(a) is type(b) for a, b in zip(dense.modules(), model.modules(), strict=True)]
    assert list(dense.state_dict()) == list(model.state_dict()) == list(want.state_dict())
    for name, tensor in dense.state_dict().items():
        source = model.state_dict()[name]
        if name in masks:
            source = torch.where(masks[name], source, 0)
        assert tensor.dtype == source.dtype
        assert tensor.numpy().tobytes() == source.numpy().tobytes(), name
        assert torch.equal(dense_state(fast)[name], tensor)
    assert dense_state(fast).keys() == dense.state_dict().keys()
    assert not dense.head.weight.requires_grad and dense.conv.weight.requires_grad
    assert dense.conv.padding == (1, 1) and sparse_layers(fast) == ["conv", "head"]


def test_to_dense_of_a_dense_model_is_a_copy():
    model = Net()
    other = sk.to_dense(model)
    assert other is not model and unchanged(other, model.state_dict())


@pytest.mark.parametrize("impl", ["dense", "compact", "csr"])
def test_a_converted_model_trains_as_the_masked_one(impl):
    torch.manual_seed(1)
    model = Net().double().eval()
    masks = sk.prune(model, 0.5, "channel", scope="layer")
    fast, dense = sk.convert(model, masks, impl=impl), masked(model, masks)
    ours = torch.optim.SGD(fast.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(dense.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        x = images(6).double()
        for one, optimizer in ((fast, ours), (dense, theirs)):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            for name, mask in masks.items():
                if one is dense:
                    one.get_parameter(name).grad.mul_(mask)
            optimizer.step()
    for name, tensor in sk.to_dense(fast).state_dict().items():
        assert torch.allclose(tensor, dense.state_dict()[name], atol=1e-12)


def test_real_measurements_end_to_end(monkeypatch):
    monkeypatch.setattr(planning, "choose", plan.choose)
    monkeypatch.setattr(planning, "recall", plan.recall)
    monkeypatch.setattr(plan, "_cache", plan.Times("plans.json"))
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = sk.convert(model, sk.prune(model, 0.9), images(), training=True)
    assert all(layer.us > 0 for layer in sk.explain(fast).layers)
    assert (plan.device.cache_dir() / "plans.json").exists()


def test_times_of_one_block_do_not_serve_for_another(monkeypatch):
    model, keys = nn.Sequential(nn.Linear(256, 256)), []
    def choose(thunks, key):
        keys.append(key)
        return "dense", dict.fromkeys(thunks, 1.0)

    monkeypatch.setattr(planning, "choose", choose)
    for pattern in ("block:16x16", "block:8x1", "block:16x16"):
        sk.convert(model, sk.prune(model, 0.75, pattern=pattern))
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    "use",
    [
        lambda model: sk.prune(model, 0.5),
        lambda model: sk.convert(model, {}),
        lambda model: sk.compact(model, {}),
        lambda model: sk.fuse(model),
        lambda model: sk.to_dense(model),
        lambda model: sk.masks_of(model),
        lambda model: sk.explain(model),
        lambda model: sk.save(model, "unwritten.safetensors"),
        lambda model: sk.instability(model, None, None),
        lambda model: sk.tickets(model),
    ],
)
@pytest.mark.parametrize(("model", "got"), [(Net().state_dict(), "OrderedDict"), (Net, "the class Net")])
def test_what_is_no_model_is_named(use, model, got):
    with pytest.raises(TypeError, match=rf"Expected a model \(a torch.nn.Module\), got {got}"):
        use(model)
