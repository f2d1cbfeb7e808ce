"""The strong lottery ticket: networks that were never trained, only masked."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from .. import data as datasets
from .. import models
from ..data import Dataset
from ..nn import convert
from ..prune import prunable
from ..ticket.solo import solo
from ..ticket.stability import order_of
from ..ticket.supermask import harvest, supermask
from ..ticket.train import Training, evaluate, fit
from .base import Check, Setting, interval, recipe
from .figure import Curve, Panel, draw, over_seeds
from .runs import scaled

_PAPER = "Ramanujan et al., What's Hidden in a Randomly Weighted Neural Network?, CVPR 2020, arXiv:1911.13299"
_KEPT = (0.1, 0.3, 0.5, 0.7, 0.9)
_WIDTHS = (0.5, 1.0, 2.0)


@recipe("edge-popup", _PAPER + ", figures 4 and 5")
def edge_popup(setting: Setting) -> list[Check]:
    """Random weights, frozen, under a trained mask: accuracy by the share kept and by width, against training."""
    data, model = setting.pick("digits", "mnist", "cifar10"), setting.pick("lenet-300-100", "lenet-300-100", "conv4")
    iterations = setting.pick(6, 2000, 35_000)  # the paper: 100 epochs of batches of 128
    searching = Training(iterations, 128, "sgd", 0.1, 0.9, 1e-4, min(500, iterations), cosine=True)
    training = replace(scaled(model, iterations), eval_every=min(100, iterations))
    seeds, found, exact = setting.seeds or setting.pick(1, 2, 3), [], True
    for seed in range(seeds):
        loaded = datasets.load(data, setting.data_dir, seed=seed).to(setting.device)
        one = {}
        for width, kept in dict.fromkeys([(1.0, kept) for kept in _KEPT] + [(width, 0.5) for width in _WIDTHS]):
            net = widened(_build(model, loaded, seed), width, seed).to(setting.device)
            part = f"width_{width}_kept_{kept}_seed_{seed}"
            run = setting.once(part, partial(_pop, net, loaded, searching, kept, seed))
            one[width, kept], exact = run["accuracy"], exact and run["frozen"] and run["exact"] and run["alike"]
        net = _build(model, loaded, seed).to(setting.device)
        trained = setting.once(f"trained_seed_{seed}", partial(solo, net, {}, loaded, training, seed))
        found.append(one | {"trained": trained["test_accuracy"]})
    _figure(setting, f"{model} on {data}", found)
    means = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
    best = max(_KEPT, key=lambda kept: means[1.0, kept])
    claim = "weights frozen to the bit, shares kept exact, the mask alike when run sparse"
    checks = [Check(claim, "by construction", "yes" if exact else "no", exact)]
    words = f"{100 * best:.0f}"
    checks.append(setting.check("best share of weights kept, %", "30 to 70", words, 0.3 <= best <= 0.7))
    for kept in (0.1, 0.9):
        mean, _, words = interval([one[1.0, 0.5] - one[1.0, kept] for one in found])
        checks.append(setting.check(f"half kept less {100 * kept:.0f} % kept, points", "above 0", words, mean > 0))
    for narrow, wide in ((0.5, 1.0), (1.0, 2.0)):
        mean, _, words = interval([one[wide, 0.5] - one[narrow, 0.5] for one in found])
        checks.append(setting.check(f"width x{wide:g} less x{narrow:g}, points", "above 0", words, mean > 0))
    mean, _, words = interval([one[2.0, 0.5] - one["trained"] for one in found])
    claim = "untrained at twice the width less trained, points (within 1)"
    checks.append(setting.check(claim, "about 0 for wide networks", words, mean >= -0.01))
    return checks


def _build(model: str, data: Dataset, seed: int) -> nn.Module:
    return models.build(model, classes=data.classes, input_shape=data.input_shape, seed=seed)


def _pop(model: nn.Module, data: Dataset, training: Training, kept: float, seed: int) -> dict:
    """A mask trained over ``model``'s signs, and whether it is what it should be."""
    searched = supermask(model, kept, seed=seed)
    start = {name: tensor.clone() for name, tensor in searched.state_dict().items() if "scores" not in name}
    fit(searched, data, training, order_of(seed))
    state = searched.state_dict()
    dense, masks = harvest(searched)
    sparse = convert(copy.deepcopy(dense), masks, data.train_x[: training.batch_size])
    accuracy = evaluate(searched, data.test_x, data.test_y)[1]
    wanted = {name: int(kept * mask.numel() + 0.5) for name, mask in masks.items()}
    return {
        "accuracy": accuracy,
        "frozen": all(torch.equal(tensor, state[name]) for name, tensor in start.items()),
        "exact": wanted == {name: int(mask.sum()) for name, mask in masks.items()},
        # sums in another order may turn one image in a thousand
        "alike": abs(accuracy - evaluate(sparse, data.test_x, data.test_y)[1]) <= 1e-3,
    }


def widened(model: nn.Sequential, factor: float, seed: int) -> nn.Sequential:
    """A chain of layers with ``factor`` times the hidden units or channels; weights are drawn anew unless it is 1."""
    if factor == 1:
        return model
    model, share, layers = copy.deepcopy(model), 1.0, list(prunable(model))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in layers:
            path, last = name.removesuffix(".weight"), name == layers[-1]
            old, ratio = model.get_submodule(path), 1.0 if last else factor
            if isinstance(old, nn.Linear):
                new = nn.Linear(round(old.in_features * share), round(old.out_features * ratio))
            else:
                channels = round(old.in_channels * share), round(old.out_channels * ratio)
                new = nn.Conv2d(*channels, old.kernel_size, padding=old.padding)
            nn.init.zeros_(new.bias)
            model.set_submodule(path, new)
            share = ratio
    return model


def _figure(setting: Setting, title: str, found: list[dict]) -> None:
    by_share = [[100 * one[1.0, share] for share in _KEPT] for one in found]
    kept = over_seeds("untrained, masked", [100 * share for share in _KEPT], by_share)
    by_width = [[100 * one[width, 0.5] for width in _WIDTHS] for one in found]
    wide = over_seeds("untrained, half kept", _WIDTHS, by_width)
    trained = 100 * sum(one["trained"] for one in found) / len(found)
    line = Curve("trained", [0.0, 100.0], [trained, trained])
    panels = [
        Panel("weights kept (%)", "test accuracy (%)", [kept, line]),
        Panel("width", "test accuracy (%)", [wide, replace(line, x=[_WIDTHS[0], _WIDTHS[-1]])]),
    ]
    draw(setting.out, f"Edge-popup: {title}", panels)
