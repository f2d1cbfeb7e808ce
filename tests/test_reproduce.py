"""Every recipe runs at its smallest scale, says what it found beside the paper, and goes on where it was."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sparsekit import models
from sparsekit.__main__ import main
from sparsekit.data import load
from sparsekit.reproduce import RECIPES, Check, reproduce, table
from sparsekit.reproduce.base import Setting
from sparsekit.reproduce.grokking import Addition
from sparsekit.reproduce.strong import widened
from sparsekit.reproduce.transfers import digits
from sparsekit.reproduce.zhou import Frozen
from sparsekit.ticket.stability import order_of
from sparsekit.ticket.train import Training, fit


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name, tmp_path, capsys):
    checks = reproduce(name, "smoke", tmp_path)
    assert checks and all(isinstance(check, Check) for check in checks)
    assert not [check for check in checks if check.passed is False]
    kept = json.loads((tmp_path / "checks.json").read_text())
    assert [check["claim"] for check in kept["checks"]] == [check.claim for check in checks]
    page = (tmp_path / "checks.md").read_text()
    assert all(check.claim in page and check.found in page for check in checks)
    drawn = json.loads((tmp_path / "figure.json").read_text())
    assert all(len(curve["x"]) == len(curve["y"]) > 0 for panel in drawn["panels"] for curve in panel["curves"])
    assert (tmp_path / "figure.png").exists() == ("(figure.png)" in page) == (find_spec("matplotlib") is not None)
    capsys.readouterr()


def test_the_papers_are_all_there():
    names = "lenet conv2 conv4 conv6 resnet20 vgg16 layerwise synflow zhou edge-popup transfer stability collapse"
    assert {*names.split(), "grokking"} <= RECIPES.keys()
    assert all(recipe.about.endswith(".") and "arXiv:" in recipe.source for recipe in RECIPES.values())


def test_an_interrupted_run_goes_on(tmp_path):
    first = reproduce("lenet", "smoke", tmp_path)
    (tmp_path / "checks.json").unlink()
    ledger = (tmp_path / "seed_0" / "summary.json").read_bytes()
    assert reproduce("lenet", "smoke", tmp_path) == first
    assert (tmp_path / "seed_0" / "summary.json").read_bytes() == ledger


def test_command_line(tmp_path, capsys, monkeypatch):
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["reproduce", "collapse", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    assert "PASS" in capsys.readouterr().out
    broken = RECIPES["collapse"].__class__("collapse", lambda setting: [Check("a", "b", "c", False)], "", "")
    monkeypatch.setitem(RECIPES, "collapse", broken)
    assert main(["reproduce", "collapse", "--scale", "smoke", "--out", str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["reproduce", "nothing"]) == 2
    assert "Expected a recipe of" in capsys.readouterr().err


def test_words():
    checks = [Check("one", "1", "2", True), Check("another", "3", "4", False), Check("open", "5", "6", None)]
    assert [line.split()[0] for line in table(checks).splitlines()[1:]] == ["PASS", "FAIL", "too"]
    with pytest.raises(ValueError, match="Expected a scale of smoke, short, paper"):
        reproduce("lenet", "huge")
    with pytest.raises(ValueError, match="at least 1 seed"):
        reproduce("lenet", "smoke", seeds=0)


def test_a_part_is_done_once(tmp_path):
    setting, done = Setting("smoke", tmp_path), []
    assert [setting.once("a", lambda: done.append(1) or {"x": 0.1}) for _ in range(2)] == [{"x": 0.1}] * 2
    assert done == [1]


def test_wider_networks_fit_together():
    for name, shape in (("lenet-300-100", (1, 8, 8)), ("conv4", (3, 16, 16))):
        model = models.build(name, input_shape=shape, seed=0)
        for factor in (0.5, 2.0):
            wide = widened(model, factor, seed=1)
            assert wide(torch.randn(2, *shape)).shape == (2, 10)
            pairs = zip(model.modules(), wide.modules(), strict=True)
            widths = [(a.weight.shape[0], b.weight.shape[0]) for a, b in pairs if isinstance(a, nn.Linear | nn.Conv2d)]
            assert all(b == factor * a for a, b in widths[:-1]) and widths[-1] == (10, 10)
        assert widened(model, 1.0, seed=1) is model


def test_frozen_weights_stay_and_others_train():
    data = load("digits")
    model = models.build("mlp:64-16-10", input_shape=(1, 8, 8), seed=0)
    mask = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    first = model.fc1.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(model.fc1, "weight", Frozen(mask, first * 2))
    fit(model, data, Training(20, 60, eval_every=20), order_of(0))
    weight = model.fc1.weight.detach()
    assert torch.equal(weight[~mask], 2 * first[~mask])
    assert (weight[mask] != first[mask]).float().mean() > 0.9


def test_digits_lie_as_mnist_does():
    data = digits(0)
    assert data.input_shape == (1, 28, 28)
    background, middle = data.train_x[0, 0, 0, 0], data.train_x[..., 4:24, 4:24]
    assert (data.train_x[..., :4, :] == background).all() and (data.train_x[..., 24:] == background).all()
    assert (middle.amax((1, 2, 3)) > background + 1).all() and (middle > background - 1e-5).all()


def test_modular_addition_is_all_there(tmp_path):
    task = Addition(Setting("smoke", tmp_path), 0)
    (x, y), (hidden_x, hidden_y) = task.shown, task.hidden
    assert len(x) + len(hidden_x) == 66
    both, answers = torch.cat([x, hidden_x]), torch.cat([y, hidden_y])
    assert both.unique(dim=0).shape[0] == 66  # each pair once, or a + b would tell b + a
    assert torch.equal((both @ torch.arange(11.0)).long() % 11, answers)
