"""Models that torch.fx cannot trace: read by torch.export where that can, said where neither can."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_compaction import Net, close, random_masks, same_state, settle
from torch import nn

import sparsekit as sk
from sparsekit.nn.walk import read_units


class Shaped(nn.Module):
    """Python control flow over shapes: torch.fx sees no number there, torch.export does."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.pool, self.drop = nn.AdaptiveAvgPool2d(2), nn.Dropout(0.5)
        self.fc1, self.head = nn.Linear(32, 12), nn.Linear(12, 4)

    def forward(self, x):
        if x.shape[0] > 100:
            raise ValueError("too many")
        y = F.relu_(self.bn1(self.conv1(x)))
        for _ in range(int(x.shape[2] > 2)):
            y = F.relu(y + self.bn2(self.conv2(y)))
        y = self.drop(self.pool(y).view(x.size(0), -1))
        return self.head(torch.tanh(self.fc1(y)))


class Data(Shaped):
    """Control flow over numbers: nobody sees both sides."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def pruned(kind):
    torch.manual_seed(0)
    model = settle(kind(), 0).double()
    return model, random_masks(model, 0.6, 1, True), torch.randn(3, 3, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_that_export_alone_sees_is_cut(inference):
    model, masks, x = pruned(Shaped)
    cut = sk.compact(model, masks, x, inference)
    assert cut.problem == "" and "read by torch.export, on the path that the inputs take" in str(cut)
    assert sum(p.numel() for p in cut.model.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    for given in (x, torch.randn(2, 3, 9, 9, dtype=torch.float64)):
        for mode in (False,) if inference else (False, True):
            nets = [copy.deepcopy(net).train(mode) for net in (cut.model, cut.original)]
            for net in nets:
                net.drop.p = 0.0
            close(nets[0](given), nets[1](given))
    same_state(cut.expand(), cut.original)


def test_a_model_that_export_alone_sees_is_regrouped():
    model, masks, x = pruned(Shaped)
    masks = random_masks(model, 0.6, 1, False)
    grouping = sk.regroup(model, masks, x, rows=4)
    assert grouping.problem == "" and "read by torch.export" in str(grouping)
    assert any(not layer.reason for layer in grouping.layers)
    close(grouping.model.eval()(x), grouping.restore().eval()(x))


def test_export_finds_the_units_that_fx_finds(monkeypatch):
    for steps, tail in ((["down", "shared"], "view"), (["gated"], "view"), (["concat", "down"], "mean")):
        torch.manual_seed(1)
        model = settle(Net(steps, nn.ReLU(inplace=True), True, True, tail), 1).double().eval()
        masks = random_masks(model, 0.6, 2, True)
        x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
        ours = read_units(model, masks, x, (False, True))
        with monkeypatch.context() as patch:
            patch.setattr(torch.fx, "Tracer", None)
            theirs = read_units(model, masks, x, (False, True))
        assert ours.note == "" and theirs.note != ""
        assert {layer.name for layer in ours.layers.values()} == {layer.name for layer in theirs.layers.values()}
        for layer in ours.layers.values():
            other = theirs.layers[id(layer.module)]
            for ids, others in ((layer.outs, other.outs), (layer.ins, other.ins)):
                fixed = [int(c) in ours.reasons for c in ours.classes[ids]]
                assert fixed == [int(c) in theirs.reasons for c in theirs.classes[others]], layer.name


def test_what_nobody_sees_is_said_and_converted_layer_by_layer(capfd):
    model, masks, x = pruned(Data)
    with pytest.warns(UserWarning, match="torch.fx cannot trace Data .*, nor can torch.export .*; convert still cuts"):
        cut = sk.compact(model, masks, x)
    assert cut.layers == () and "nor can torch.export" in str(cut)
    assert not capfd.readouterr().err  # torch would print its graph
    fast = sk.convert(model.eval(), masks, x, impl={"conv1": "compact"})
    close(fast(x), cut.original.eval()(x))


def test_a_layer_off_the_path_stops_it():
    class Off(Shaped):
        def forward(self, x):
            return super().forward(x) if x.shape[0] < 3 else self.head(x.new_ones(x.shape[0], 12))

    model, masks, x = pruned(Off)
    with pytest.warns(UserWarning, match="the inputs do not pass through conv1"):
        assert sk.compact(model, masks, x).layers == ()


def test_guessed_inputs_are_not_exported():
    model, masks, _ = pruned(Shaped)
    with pytest.warns(UserWarning, match="torch.fx cannot trace Shaped") as caught:
        sk.compact(model, masks)
    assert "torch.export" not in str(caught[0].message)
