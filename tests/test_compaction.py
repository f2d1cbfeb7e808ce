"""compact: a smaller network with the same outputs, in both modes, and the way back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekit as sk
from sparsekit.nn import compaction
from sparsekit.nn.bordered import BorderedConv2d


class Net(nn.Module):
    """A random convolutional network: plain, residual, grouped, concatenating and shared steps in any order."""

    def __init__(self, steps, activation, bias, norm, tail, width=8):
        super().__init__()
        self.stem, self.steps, self.tail = nn.Conv2d(3, width, 3, padding=1, bias=bias), steps, tail
        self.act = activation
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for step in steps:
            groups = {"grouped": 2, "depthwise": width}.get(step, 1)
            out = 2 * width if step == "down" else width
            stride, pad = (2, 0) if step == "down" else (1, 1)
            first = nn.Conv2d(width, out, 3, stride, pad, groups=groups, bias=bias)
            second = nn.Conv2d(width, out, 1, stride, bias=bias) if step == "down" else nn.Conv2d(out, out, 1)
            self.layers.append(nn.ModuleList([first, second]))
            self.norms.append(nn.BatchNorm2d(2 * out if step == "concat" else out) if norm else nn.Identity())
            width = 2 * out if step == "concat" else out
        self.hidden = nn.Linear(width * (4 if tail == "flatten" else 1), 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        for step, (first, second), norm in zip(self.steps, self.layers, self.norms, strict=True):
            if step == "residual":
                x = self.act(norm(first(x)) + x)
            elif step == "down":
                x = F.relu(norm(first(F.pad(x, (1, 1, 1, 1))))) + second(x)
            elif step == "concat":
                x = norm(torch.cat([first(x), self.act(second(x))], 1))
            elif step == "shared":
                x = self.act(norm(second(self.act(second(first(x))))))
            elif step == "gated":
                x = norm(first(x)) * second(x.mean((2, 3), keepdim=True)).sigmoid()
            else:
                x = self.act(norm(first(x)))
        if self.tail == "flatten":
            x = F.adaptive_max_pool2d(x, 2).flatten(1)
        elif self.tail == "view":
            x = F.avg_pool2d(x, x.size(2)).view(x.size(0), -1)
        else:
            x = x.mean([-2, -1])
        return self.head(F.dropout(self.act(self.hidden(x)), 0.0, self.training))


STEPS = ["plain", "residual", "down", "concat", "shared", "gated", "grouped", "depthwise"]
nets = st.fixed_dictionaries(
    {
        "steps": st.lists(st.sampled_from(STEPS), max_size=3),
        "activation": st.sampled_from([nn.ReLU(), nn.GELU(), nn.Tanh(), nn.ReLU(inplace=True)]),
        "bias": st.booleans(),
        "norm": st.booleans(),
        "tail": st.sampled_from(["flatten", "view", "mean"]),
    }
)


def settle(model, seed):
    """Biases and statistics of a trained network, some of them such that a dead channel stays 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name in ("bias", "running_mean"):
            if isinstance(getattr(module, name, None), torch.Tensor):
                tensor = getattr(module, name).data
                tensor.copy_(torch.randn(tensor.shape, generator=generator).clamp(max=0.7) * 0.5)
    return model


def random_masks(model, share, seed, whole):
    """Masks with dead rows and columns; ``whole`` ones have no other holes."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, module in sk.prunable(model, ["head"]).items():
        shape = module.weight.shape
        rows, columns = (torch.rand(n, generator=generator) > share for n in shape[:2])
        inside = torch.rand(shape, generator=generator) > (0.0 if whole else share)
        grid = (rows[:, None] & (columns[None] | torch.tensor(whole))).view(*shape[:2], *[1] * (len(shape) - 2))
        masks[name] = grid & inside
    return masks


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def same_state(model, other):
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def watch(model):
    """``{layer: bool per row}``: whose output varies; filled when the model runs."""
    varying = {}

    def see(name):
        def hook(module, args, out):
            lines = out.detach().transpose(0, 1).flatten(1)
            varying[name] = varying.get(name, False) | (lines.std(1) > 1e-9)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(see(name))
    return varying


def same_gradients(cut, small, full, varying):
    """What is left gets the gradients that it gets in the whole network, but for the constants of dead units."""
    for name, p in small.named_parameters():
        if p.grad is None:  # not called
            continue
        wanted, got, rows = full[name].grad[cut.kept.get(name, ...)], p.grad, varying[name.rpartition(".")[0]]
        if name in cut.masks:
            assert cut.masks[name].shape == p.shape
            wanted, got = wanted * cut.masks[name], got * cut.masks[name]
        close(got[rows], wanted[rows])


def rows(cut):
    return {c.name: c.after[0] for c in cut.layers}


@pytest.fixture
def clock(monkeypatch):
    """Times in which maps of constants win, or not."""
    times = {"carried": 2.0, "mapped": 1.0}
    monkeypatch.setattr(compaction, "compare", lambda *a: dict(times))
    return times


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(net=nets, share=st.sampled_from([0.3, 0.6, 0.9]), seed=st.integers(0, 999), whole=st.booleans())
def test_random_networks(clock, net, share, seed, whole):
    clock["mapped"] = 1.0 + 2 * (seed % 2)
    torch.manual_seed(seed)
    model = settle(Net(**net), seed).double()
    masks = random_masks(model, share, seed, whole)
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    for inference in (False, True):
        cut = sk.compact(model, masks, x, inference=inference)
        assert cut.problem == ""
        dense = copy.deepcopy(cut.original)
        same_state(cut.expand(), dense)
        for mode in (False, True) if not inference else (False,):
            small, full = copy.deepcopy(cut.model).train(mode), copy.deepcopy(dense).train(mode)
            varying = watch(small)
            wanted, got = full(x), small(x)
            close(got, wanted)
            if not inference:
                got.square().sum().backward()
                wanted.square().sum().backward()
                same_gradients(cut, small, dict(full.named_parameters()), varying)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def sequential(*widths, activation=nn.ReLU):
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def channel(mask, alive):
    mask[:] = False
    mask[alive] = True
    return mask


def test_a_channel_pruned_mlp_is_as_small_as_can_be():
    model = sequential(16, 32, 24, 4)
    masks = sk.prune(model, 0.75, pattern="channel", scope="layer", exclude="4")
    cut = sk.compact(model, masks)
    assert rows(cut) == {"0": 8, "2": 6, "4": 4}
    assert [m.weight.shape for m in cut.model[::2]] == [(8, 16), (6, 8), (4, 6)]
    assert all(mask.all() for mask in cut.masks.values())
    x = torch.randn(5, 16)
    torch.testing.assert_close(cut.model(x), cut.original(x))
    assert "32 -> 8 out" in str(cut)


def test_constants_go_into_the_next_bias():
    model = sequential(3, 4, 2, activation=nn.Sigmoid).double()
    mask = channel(torch.ones(4, 3, dtype=torch.bool), [1, 3])
    cut = sk.compact(model, {"0.weight": mask})
    held = model[0].bias.sigmoid() * torch.tensor([1.0, 0, 1, 0])
    close(cut.model[2].bias, model[2].bias + model[2].weight @ held.double())
    same_state(cut.expand(), cut.original)
    with torch.no_grad():
        cut.model[2].bias += 1
    close(cut.expand()[2].bias, model[2].bias + 1)


def test_a_constant_under_zero_padding_stays_or_is_carried(clock):
    clock["mapped"] = 2.0
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)).double()
    nn.init.constant_(model[0].bias, 0.5)
    masks = {"0.weight": channel(torch.ones(6, 2, 1, 1, dtype=torch.bool), [0])}
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    whole = sk.compact(model, masks, x)
    assert rows(whole)["0"] == 6
    assert whole.layers[0].kept == {"constant, at the padded border of 2": 5}
    cut = sk.compact(model, masks, x, inference=True)
    assert rows(cut)["0"] == 2
    close(cut.model(x), whole.original(x))
    same_state(cut.expand(), whole.original)
    model[2].padding_mode = "circular"  # a constant has no border then
    model[2] = nn.Conv2d(6, 3, 3, padding=1, padding_mode="circular").double()
    cut = sk.compact(model, masks, x)
    assert rows(cut)["0"] == 1
    close(cut.model(x), cut.original(x))


def test_constants_under_zero_padding_become_maps(clock):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 3, 3, padding=2, bias=False),
    ).double()  # fmt: skip
    nn.init.constant_(model[0].bias, 0.5)
    masks = {"0.weight": channel(torch.ones(6, 2, 1, 1, dtype=torch.bool), [0]), "2.weight": torch.ones(4, 6, 3, 3) > 0}
    x = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    cut = sk.compact(model, masks, x, inference=True)
    assert rows(cut) == {"0": 1, "2": 4, "3": 3} and isinstance(cut.model[2], BorderedConv2d)
    assert "constants under zero padding are added as maps: maps are 2.00x as fast" in str(cut)
    fast = sk.convert(cut.model, cut.masks, impl="csr")
    for size in ((7, 5), (4, 9), (7, 5)):
        x = torch.randn(2, 2, *size, dtype=torch.float64)
        for net in (cut.model, copy.deepcopy(cut.model), fast, torch.fx.symbolic_trace(cut.model)):
            close(net(x), cut.original(x))
            with torch.no_grad():
                close(net(x), cut.original(x))
                close(net(x), cut.original(x))
    same_state(cut.expand(), cut.original)
    same_state(cut.expand(fast), cut.original)
    assert sk.regroup(cut.model, cut.masks, x).problem == ""
    with torch.no_grad():
        program = torch.export.export(cut.model, (x,))
        close(program.module()(x), cut.original(x))


def test_a_layer_with_holes_carries_its_constants(clock):
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)).double()
    nn.init.constant_(model[0].bias, 0.5)
    masks = {"0.weight": channel(torch.ones(6, 2, 1, 1, dtype=torch.bool), [0, 1])}
    masks["2.weight"] = torch.arange(3 * 6 * 9).view(3, 6, 3, 3) > 0
    cut = sk.compact(model, masks, torch.randn(1, 2, 4, 4, dtype=torch.float64), inference=True)
    assert type(cut.model[2]) is nn.Conv2d and rows(cut)["0"] == 3 and cut.note == ""


def test_the_choice_is_measured():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))
    nn.init.constant_(model[0].bias, 0.5)
    masks = {"0.weight": channel(torch.ones(6, 2, 1, 1, dtype=torch.bool), [0])}
    cut = sk.compact(model, masks, torch.randn(2, 2, 8, 8), inference=True)
    assert rows(cut)["0"] == 1 + (type(cut.model[2]) is nn.Conv2d) and "x as fast" in cut.note


def test_a_norm_that_differs_in_training_keeps_its_channel():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
    masks = {"0.weight": channel(torch.ones(4, 2, 1, 1, dtype=torch.bool), [0, 1])}
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 0.0, 0.3, -9.0]))  # the last is cut to 0 in both modes
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    cut = sk.compact(model, masks, x)
    assert rows(cut)["0"] == 3 and cut.model[1].num_features == 3
    assert list(cut.layers[0].kept) == ["constant, but another one in training, for 3"]
    cut = sk.compact(model.eval(), masks, x, inference=True)
    assert rows(cut)["0"] == 2
    close(cut.model(x), cut.original(x))


def test_residual_sums_keep_the_union():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x)
            y += self.b(y)
            return self.c(y)

    model = Block()
    nn.init.zeros_(model.a.bias), nn.init.zeros_(model.b.bias)
    masks = {
        "a.weight": channel(torch.ones(6, 4, dtype=torch.bool), [0, 1]),
        "b.weight": channel(torch.ones(6, 6, dtype=torch.bool), [1, 2]),
    }
    cut = sk.compact(model, masks)
    assert rows(cut) == {"a": 3, "b": 3, "c": 2}
    x = torch.randn(3, 4)
    torch.testing.assert_close(cut.model(x), cut.original(x))


def test_dead_columns_take_what_feeds_only_them():
    model = sequential(8, 6, 6, 3)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 2:] = False
    cut = sk.compact(model, {"4.weight": mask})
    assert rows(cut) == {"0": 6, "2": 2, "4": 3}
    assert cut.model[4].weight.shape == (3, 2) and cut.masks["4.weight"].all()


def test_depthwise_channels_go_as_a_whole():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 4, 1))
    nn.init.zeros_(model[0].bias)
    masks = {"0.weight": channel(torch.ones(8, 3, 1, 1, dtype=torch.bool), [1, 5, 6])}
    x = torch.randn(2, 3, 6, 6)
    cut = sk.compact(model, masks, x)
    assert (cut.model[1].groups, cut.model[1].weight.shape) == (3, (3, 1, 3, 3))
    torch.testing.assert_close(cut.model(x), cut.original(x))
    same_state(cut.expand(), cut.original)


class Signals(nn.Module):
    """Convolutions over one dimension, padded with zeros and in circles, with a norm, a pool and a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv1d(4, 12, 5, padding=2), nn.BatchNorm1d(12)
        self.body = nn.Conv1d(12, 12, 3, padding=1, padding_mode="circular", bias=False)
        self.deep = nn.Conv1d(12, 12, 3, groups=12, stride=2, bias=False)
        self.last = nn.Conv1d(12, 8, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.avg_pool1d(F.relu(self.body(x)) + x, 2)
        return self.head(self.last(self.deep(x)).flatten(1))


class Branching(Signals):
    """Its code asks the data, which torch.fx cannot trace."""

    def forward(self, x):
        if x.shape[0] > 100 and x.sum() > 0:
            return super().forward(-x)
        return super().forward(x)


@pytest.mark.parametrize("net", [Signals, Branching])
@pytest.mark.parametrize("seed", range(3))
def test_convolutions_over_one_dimension(net, seed):
    torch.manual_seed(seed)
    model = settle(net().double(), seed)
    masks = random_masks(model, 0.4, seed, whole=True)
    cut = sk.compact(model, masks, x := torch.randn(5, 4, 18, dtype=torch.float64))
    assert bool(cut.note) == (net is Branching) and not cut.problem
    small, full = (sum(p.numel() for p in model.parameters()) for model in (cut.model, model))
    assert small < 0.8 * full, str(cut)
    for mode in (True, False):
        close(copy.deepcopy(cut.model).train(mode)(x), copy.deepcopy(cut.original).train(mode)(x))
    same_state(cut.expand(), cut.original)
    moved = sk.regroup(model, masks, x)
    close(moved.model.eval()(x), cut.original.eval()(x))
    same_state(moved.restore(), cut.original)


class Sized(nn.Module):
    """Its view has a size written out, so its units cannot go."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.a(x).view(-1, 6))


class Chunked(Sized):
    """Halves of a tensor would move if units went."""

    def forward(self, x):
        one, other = self.a(x).chunk(2, 1)
        return self.b(torch.cat([one * other, other], 1))


class Softmaxed(Sized):
    """Every unit changes every other."""

    def forward(self, x):
        return self.b(self.a(x).softmax(1))


class Peeking(Sized):
    """A weight is used past its layer."""

    def forward(self, x):
        return self.b(self.a(x)) + F.linear(x, self.a.weight).sum()


class Functional(Sized):
    """A layer that is never called."""

    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


@pytest.mark.parametrize("kind", [Sized, Chunked, Softmaxed, Peeking, Functional])
def test_what_is_not_understood_stays(kind):
    model = kind()
    nn.init.zeros_(model.a.bias)
    cut = sk.compact(model, {"a.weight": channel(torch.ones(6, 4, dtype=torch.bool), [0])})
    assert cut.problem == "" and rows(cut) == {"a": 6, "b": 2}
    assert sum(cut.layers[0].kept.values()) == 5
    same_state(cut.model, cut.original)


def test_hooks_see_what_they_saw():
    model = sequential(4, 6, 2)
    seen = []
    model[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    cut = sk.compact(model, {"0.weight": channel(torch.ones(6, 4, dtype=torch.bool), [0])})
    cut.model(torch.randn(2, 4))
    assert seen[-1] == (2, 6) and rows(cut)["0"] == 6


def test_untraceable_models_are_left_to_convert():
    class Branch(Sized):
        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.b(-self.a(x))

    model = Branch()
    masks = {"a.weight": channel(torch.ones(6, 4, dtype=torch.bool), [0])}
    with pytest.warns(UserWarning, match="nothing is cut, torch.fx cannot trace Branch"):
        cut = sk.compact(model, masks, torch.randn(2, 4))
    assert "cannot trace" in str(cut) and cut.masks.keys() == masks.keys()
    same_state(cut.model, cut.original)


def test_trains_and_comes_back_through_convert_and_files(tmp_path):
    model = sequential(16, 32, 4)
    masks = sk.prune(model, 0.8, pattern="channel", scope="layer", exclude="2")
    cut = sk.compact(model, masks)
    part = sk.prune(cut.model, 0.5)
    fast = sk.convert(cut.model, part, impl="csr")
    optimizer = torch.optim.Adam(fast.parameters(), 0.1)
    for _ in range(3):
        fast(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
    back = cut.expand(fast)
    x = torch.randn(4, 16)
    torch.testing.assert_close(back(x), fast(x))
    for name, mask in masks.items():
        assert (back.get_parameter(name)[~mask] == 0).all()
    sk.save(sk.convert(back, masks, impl="csr"), tmp_path / "t.safetensors")
    again = sk.to_dense(sk.load(tmp_path / "t.safetensors", model, impl="csr"))
    same_state(again, back)


def test_masks_are_read_from_the_model():
    model = sequential(8, 6, 3)
    nn.utils.prune.custom_from_mask(model[0], "weight", channel(torch.ones(6, 8, dtype=torch.bool), [0, 1]))
    assert rows(sk.compact(model))["0"] == 2
    sparse = sk.convert(model, impl="csr")
    cut = sk.compact(sparse)
    assert rows(cut)["0"] == 2 and type(cut.model[0]) is nn.Linear


def test_nothing_dead_nothing_cut():
    model = sequential(8, 6, 3)
    cut = sk.compact(model, {})
    same_state(cut.model, model)
    assert cut.kept == {} and "6 out" in str(cut)


def test_everything_dead():
    model = sequential(8, 6, 3)
    masks = {name: torch.zeros_like(m.weight, dtype=torch.bool) for name, m in sk.prunable(model).items()}
    cut = sk.compact(model, masks)
    x = torch.randn(4, 8)
    assert rows(cut) == {"0": 1, "2": 3}
    torch.testing.assert_close(cut.model(x), cut.original(x))
    same_state(cut.expand(), cut.original)


def test_bad_masks_and_foreign_models_are_refused():
    model = sequential(8, 6, 3)
    with pytest.raises(ValueError, match="0.weight: Expected a mask of shape"):
        sk.compact(model, {"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    cut = sk.compact(model, {"0.weight": channel(torch.ones(6, 8, dtype=torch.bool), [0])})
    with pytest.raises(ValueError, match="0.weight: Expected a shape of"):
        cut.expand(sequential(8, 5, 3))
    with pytest.raises(ValueError, match="Expected a model that this compaction made"):
        cut.expand(sequential(8, 5, 5, 3))
